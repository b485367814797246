"""Treebanks and tagged texts: reading, printing, classes of words, and damaged files."""

import re
import types
import zipfile

import pytest

from benchmarks.linguistics.classes import CATEGORIES, CONTENT, FUNCTION, OTHER, category, side
from benchmarks.linguistics.text import print_words, run_tagger
from benchmarks.linguistics.treebank import read_treebank
from qs_jax.errors import InputError
from tests.benchmarks.linguistics.miniature import PHRASES, TAGS, TEXT, WORDS, write_treebank


def test_a_treebank_as_text(tmp_path):
    text = read_treebank(write_treebank(tmp_path))
    assert text.text == TEXT
    assert text.words == WORDS
    assert list(text.tags) == TAGS
    assert [tuple(phrase) for phrase in text.phrases[: len(PHRASES)]] == PHRASES
    assert {("PRN", 15, 19), ("NP", 16, 18)} < set(text.phrases)
    # Nothing is left of empty elements: neither the subject of "Run" nor the clause after "said".
    assert [p for p in text.phrases if p.first <= 14 < p.end] == [("S", 9, 20), ("VP", 14, 15)]
    with zipfile.ZipFile(tmp_path / "mini.zip") as archive:
        archive.extractall(tmp_path / "folder")
    unpacked = read_treebank(tmp_path / "folder")
    assert (unpacked.text, unpacked.phrases) == (text.text, text.phrases)


DEEP = "(S " * 5000 + "(NN dog)" + ")" * 5000


def test_every_word_of_a_tree_is_in_the_text(tmp_path):
    """Brackets of all kinds, escapes, quotes; empty elements and files of macOS hold no words."""
    words = r"-LRB- x -RRB- -LSB- 1\/2 -RSB- -LCB- A\*B -RCB- `` * '' :-RRB- f-LRB-x-RRB- 0".split()
    printed = '( x ) [ 1/2 ] { A*B } " * " :) f(x) 0'.split()
    leaves = " (-NONE- *T*-1) (NP-SBJ (-NONE- 0)) ".join(f"(TAG {word})" for word in words)
    (tmp_path / "a.mrg").write_text(f"\ufeff((S {leaves}))\n((S (-NONE- *U*)))\n((S (TAG end)))")
    (tmp_path / "._a.mrg").write_bytes(b"\0\5\x16\7")
    text = read_treebank(tmp_path)
    assert text.words == [*printed, "end"]
    assert text.text == '(x) [1/2] {A*B} "*" :) f(x) 0 end'
    assert text.tags == ("TAG",) * len(text.words)


def test_spacing_of_print():
    words = (
        "C$ 5 a.m. , `` So ... '' -LRB- # 3 % -RRB- -- AT&T 's wo n't gon na go ; A\\/B .".split()
    )
    text, spans = print_words(words)
    assert text == "C$5 a.m., \"So...\" (#3%) -- AT&T's won't gonna go; A/B."
    assert [text[start:end] for start, end in spans][:4] == ["C$", "5", "a.m.", ","]
    assert print_words(["at", "8", "a.m.", "."])[0] == "at 8 a.m."
    assert print_words(["..."])[0] == "..."


def test_categories_of_the_paper():
    expected = {
        **{"DT": 0, "IN": 1, "CC": 2, "PRP": 3, "PRP$": 3, "MD": 4, "VBZ": 4, "VBP": 4},
        **dict.fromkeys("NN NNS NNP NNPS VB VBD VBG VBN JJ JJR JJS RB RBR RBS".split(), 5),
        **{"NN|VBG": 5, "VBP|TO": 4},
    }
    assert {tag: CATEGORIES.index(category(tag)) for tag in expected} == expected
    others = "PDT WDT EX TO CD POS WP WP$ WRB RP UH FW SYM , . -LRB- $".split()
    assert {category(tag) for tag in others} == {OTHER}
    words = [("is", "VBZ"), ("says", "VBZ"), ("can", "MD"), ("'ve", "VBP"), ("was", "VBD")]
    assert [side(*word) for word in words] == [FUNCTION, CONTENT, FUNCTION, FUNCTION, CONTENT]
    assert [side("the", "DT"), side(".", ".")] == [FUNCTION, OTHER]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("( (S (NN dog)\n", "damaged: Un-matched open paren"),
        ("( (S (NN dog)) ))\n", "damaged: Un-matched close paren"),
        ("((NN a))\ndog\n((NN b))", "damaged: .*dog"),
        ("((S (NP the (NN dog))))", "the word 'the' has no tag"),
        ("((NP a dog))", "the word 'a' has no tag"),
        ("((S (-NONE- *)))", "holds no trees with words"),
        ("((S (-LRB- () (NN dog) (-RRB- ))))", r"damaged: \( \) has no word; a bracket is -LRB-"),
        ("((S (NN dog) (, )))", r"damaged: \(, \) has no word"),
        ("((S (NN dog)))\n( )", r"damaged: \( \) has no word"),
        ("((NP (NN f(x))))", "the word 'f' has no tag"),
        ("((S (NN dog) (-NONE- cat)))", "'cat' has the tag of empty elements"),
        pytest.param(DEEP, "damaged: .*(depth|recursion)", id="deep"),
        ("((NN d\xf6g))".encode("latin-1"), "one.mrg is not UTF-8"),
    ],
)
def test_damaged_trees(tmp_path, content, message):
    (tmp_path / "one.mrg").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_treebank(tmp_path)
    (tmp_path / "torn.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="is no whole zip file"):
        read_treebank(tmp_path / "torn.zip")


def test_tags_of_any_text_line_by_line():
    def words(line):
        """As spaCy gives them: white space is a token of its own."""
        for m in re.finditer(r"\S+|\s{2,}", line):
            tag = "DT" if m[0] == "the" else "NNP"
            yield types.SimpleNamespace(text=m[0], idx=m.start(), is_space=m[0].isspace(), tag_=tag)

    pipeline = types.SimpleNamespace(pipe=lambda lines: map(words, lines))
    text = run_tagger("the  dog\n\nthe 😀 cat", pipeline, "mine")
    assert text.words == ["the", "dog", "the", "😀", "cat"]
    assert text.tags == ("DT", "NNP", "DT", "NNP", "NNP")
    with pytest.raises(InputError, match="holds no words"):
        run_tagger("\n \n", pipeline, "mine")
    word = types.SimpleNamespace(text="a", idx=0, is_space=False, tag_="")
    with pytest.raises(InputError, match="has no tagger"):
        run_tagger("a", types.SimpleNamespace(pipe=lambda lines: [[word]]), "mine")


def test_the_real_treebank(research_data):
    """Counts of the data's own description."""
    text = read_treebank(research_data / "treebank" / "treebank.zip")
    assert (len(text.tags), len(set(text.tags)), text.text.count("\n\n")) == (94_084, 45, 198)
