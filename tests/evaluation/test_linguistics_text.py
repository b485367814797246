"""Treebanks as text: reading, printing, classes of words, and damaged files."""

import re
import sys
import types
import zipfile

import pytest

from qs_jax.errors import InputError
from qs_jax.evaluation.linguistics import Phrase, read_treebank, tag_text, written
from qs_jax.evaluation.linguistics.align import (
    word_labels,
)
from qs_jax.evaluation.linguistics.spacy_tags import tagged
from qs_jax.evaluation.linguistics.spans import Sentence, join
from qs_jax.evaluation.linguistics.tags import (
    AUXILIARY,
    CATEGORIES,
    CONTENT,
    FUNCTION,
    OTHER,
    category,
    from_ud,
    is_auxiliary,
    side,
)
from tests.evaluation.miniature import (
    BROWN,
    ONE,
    PHRASES,
    TAGS,
    TEXT,
    TWO,
    WORDS,
    write_maps,
    write_treebank,
    write_zip,
)


def test_a_penn_treebank_as_text(tmp_path):
    text = read_treebank(write_treebank(tmp_path))
    assert text.text == TEXT
    assert text.words == WORDS
    assert list(text.tags) == TAGS
    assert [tuple(phrase) for phrase in text.phrases[: len(PHRASES)]] == PHRASES
    assert Phrase("PRN", 15, 19) in text.phrases
    assert Phrase("NP", 16, 18) in text.phrases
    # Nothing is left of empty elements: neither the subject of "Run" nor the clause after "said".
    assert [p for p in text.phrases if p.first <= 14 < p.end] == [
        Phrase("S", 9, 20),
        Phrase("VP", 14, 15),
    ]
    assert text.universal[:9] == ("DET", "ADJ", "NOUN", "VERB", "ADV", "VERB", "ADP", "PRON", ".")


def test_a_folder_reads_as_its_zip_file(tmp_path):
    zipped = read_treebank(write_treebank(tmp_path))
    folder = tmp_path / "unpacked" / "combined"
    folder.mkdir(parents=True)
    for name, content in (("one", ONE), ("two", TWO)):
        (folder / f"{name}.mrg").write_text(content)
    read = read_treebank(folder.parent, tmp_path / "universal_tagset" / "en-ptb.map")
    assert (read.text, read.tags, read.phrases) == (zipped.text, zipped.tags, zipped.phrases)


def test_brown_as_text(tmp_path):
    write_maps(tmp_path)
    text = read_treebank(write_zip(tmp_path / "brown.zip", {"brown/ca01": BROWN, "cats.txt": ""}))
    assert text.text == "The dog can't bark \"now\". He's fine;;"
    assert text.tags[:3] == ("AT", "NN", "MD*")
    assert text.universal[:3] == ("DET", "NOUN", "VERB")
    assert text.phrases is None
    labels = word_labels(text)
    assert labels["paper"][:4] == [CATEGORIES[0], CATEGORIES[5], CATEGORIES[4], CATEGORIES[5]]
    assert labels["auxiliary"][2] == AUXILIARY
    assert labels["paper"][8] == CATEGORIES[3]  # "He's" is a pronoun with a verb


def test_spacing_of_print():
    words = (
        "C$ 5 a.m. , `` So ... '' -LRB- # 3 % -RRB- -- AT&T 's wo n't gon na go ; A\\/B .".split()
    )
    text, spans = written(words)
    assert text == "C$5 a.m., \"So...\" (#3%) -- AT&T's won't gonna go; A/B."
    assert [text[start:end] for start, end in spans][:4] == ["C$", "5", "a.m.", ","]
    assert written(["at", "8", "a.m.", "."])[0] == "at 8 a.m."
    assert written(["..."])[0] == "..."


@pytest.mark.parametrize("word", ["", "a b", "\u2003"])
def test_words_that_cannot_be_printed(word):
    with pytest.raises(InputError, match="word 2"):
        written(["a", word])
    with pytest.raises(InputError, match=r"mine\.mrg"):
        join([[Sentence(("a", word), ("X", "X"), (), "mine.mrg")]], ["X", "X"], name="", tag_set="")


def test_categories_of_the_paper():
    expected = {
        **{"DT": 0, "IN": 1, "CC": 2, "PRP": 3, "PRP$": 3, "MD": 4, "VBZ": 4, "VBP": 4},
        **dict.fromkeys("NN NNS NNP NNPS VB VBD VBG VBN JJ JJR JJS RB RBR RBS".split(), 5),
        **{"NN|VBG": 5, "VBP|TO": 4},
    }
    assert {tag: category(tag) for tag in expected} == {
        tag: CATEGORIES[index] for tag, index in expected.items()
    }
    others = "PDT WDT EX TO CD POS WP WP$ WRB RP UH FW SYM , . -LRB- $".split()
    assert {category(tag) for tag in others} == {OTHER}
    words = [("is", "VBZ"), ("says", "VBZ"), ("can", "MD"), ("'ve", "VBP"), ("was", "VBD")]
    assert [is_auxiliary(*word) for word in words] == [True, False, True, True, False]
    assert [side(*word) for word in words] == [FUNCTION, CONTENT, FUNCTION, FUNCTION, CONTENT]
    assert side("the", "DT") == FUNCTION
    assert side(".", ".") == OTHER
    brown = {
        "AT": 0,
        "CS": 1,
        "IN-TL": 1,
        "CC": 2,
        "PP$": 3,
        "MD*": 4,
        "BEDZ": 4,
        "VBZ": 4,
        "NP$": 5,
    }
    assert {tag: CATEGORIES.index(category(tag, "brown")) for tag in brown} == brown
    assert category("WDT", "brown") == category("*", "brown") == OTHER
    names = {"AUX": "VERB", "PROPN": "NOUN", "SCONJ": "ADP", "DET": "DET", "PUNCT": ".", "": "X"}
    assert {name: from_ud(name) for name in names} == names


DAMAGED = {
    "unclosed": ("( (S (NN dog)\n", r"one\.mrg, line 1: the tree .* lacks 2 closing brackets"),
    "closed twice": ("( (S (NN dog)) ))\n", r"one\.mrg, line 1: a closing bracket without"),
    "second tree": ("((NN a))\n\n( (S (NN dog)\n", r"one\.mrg, line 3: the tree"),
    "stray": ("((NN a))\ndog\n((NN b))", r"one\.mrg, line 2: 'dog' stands outside"),
    "stray at the end": ("((NN a))\n\nthe end", r"one\.mrg, line 3: 'the' stands outside"),
    "no tag": (
        "((NN a))\n((S (NP the (NN dog))))",
        r"tree 2 \(line 2\): the word 'the' has no tag",
    ),
    "bare words": ("((NP a dog))", r"tree 1 \(line 1\): the word 'a' has no tag"),
    "unknown tag": ("((NN a))\n((S (QQ dog)))", r"tree 2 \(line 2\): the tag 'QQ' of 'dog'"),
    "traces only": ("((S (-NONE- *)))", "hold no words"),
    "empty": ("", "hold no words"),
    "a bracket for a word": ("((NN ())", r"one\.mrg, line 1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_trees(tmp_path, name):
    content, message = DAMAGED[name]
    write_maps(tmp_path)
    path = write_zip(tmp_path / "bad.zip", {"mini/combined/one.mrg": content})
    with pytest.raises(InputError, match=message):
        read_treebank(path)


TAGGED = "[ The/DT old/JJ dog/NN ]\ndoes/VBZ n't/RB bark/VB at/IN\n[ me/PRP ]\n./.\n"
TAGGED += "=====\n``/`` Run/VB ,/, ''/''\nshe/PRP said/VBD (/( 1\\/2/CD mile/NN )/) ./.\n''/''\n"


def test_a_tagged_file_that_matches(tmp_path):
    write_maps(tmp_path)
    files = {"mini/combined/one.mrg": ONE, "mini/tagged/one.pos": TAGGED}
    assert read_treebank(write_zip(tmp_path / "good.zip", files)).words == WORDS[:20]


@pytest.mark.parametrize(
    ("tagged_text", "message"),
    [
        (
            TAGGED.replace("bark/VB", "bite/VB"),
            r"one\.pos, line 2 has 'bite' where .*one\.mrg, tree 1",
        ),
        (TAGGED.replace("mile/NN ", ""), r"one\.pos, line 7 has '\)' where .*tree 2 .* has 'mile'"),
        ("The/DT", r"one\.pos ends before 'old' of .*tree 1"),
    ],
)
def test_a_tagged_file_that_does_not_match(tmp_path, tagged_text, message):
    write_maps(tmp_path)
    files = {"mini/combined/one.mrg": ONE, "mini/tagged/one.pos": tagged_text}
    with pytest.raises(InputError, match=message):
        read_treebank(write_zip(tmp_path / "bad.zip", files))


def test_what_is_no_treebank(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        read_treebank(tmp_path / "nowhere.zip")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(InputError, match="not a whole zip file"):
        read_treebank(tmp_path / "text.zip")
    for files in ({}, {"README": "hello"}):
        with pytest.raises(InputError, match=f"holds no treebank: .* its {len(files)} files"):
            read_treebank(write_zip(tmp_path / "empty.zip", files))
    path = write_zip(tmp_path / "mini.zip", {"one.mrg": ONE})
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    with pytest.raises(InputError, match="--tag-map"):
        read_treebank(path)
    for content, message in (("DT DET\n", "line 1: expected a tag, a tab"), ("\n", "is empty")):
        (tmp_path / "bad.map").write_text(content)
        with pytest.raises(InputError, match=message):
            read_treebank(path, tmp_path / "bad.map")
    with pytest.raises(InputError, match="cannot be read"):
        read_treebank(path, tmp_path / "nowhere.map")
    write_maps(tmp_path)
    bad = write_zip(tmp_path / "brown.zip", {"ca01": "The/at dog\n"})
    with pytest.raises(InputError, match="ca01, line 1: 'dog' is not word/tag"):
        read_treebank(bad)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.mrg").write_bytes(b"((NN a))\n((NN \xff))")
    with pytest.raises(InputError, match=r"one\.mrg, line 2 is not UTF-8"):
        read_treebank(tmp_path / "folder", tmp_path / "universal_tagset" / "en-ptb.map")


def test_without_nltk(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(InputError, match=re.escape('pip install "qs-jax[linguistics]"')):
        read_treebank(write_treebank(tmp_path))


class Pipeline:
    """Words between spaces, as spaCy gives them: with white space as tokens of its own."""

    def pipe(self, lines):
        for line in lines:
            yield [
                types.SimpleNamespace(
                    text=m[0],
                    idx=m.start(),
                    is_space=m[0].isspace(),
                    tag_="DT" if m[0] == "the" else "NNP",
                    pos_="DET" if m[0] == "the" else "PROPN",
                )
                for m in re.finditer(r"\S+|\s{2,}", line)
            ]


def test_tags_of_any_text_line_by_line():
    text = tagged("the  dog\n\nthe 😀 cat", Pipeline(), "mine")
    assert text.words == ["the", "dog", "the", "😀", "cat"]
    assert text.tags == ("DT", "NNP", "DT", "NNP", "NNP")
    assert text.universal == ("DET", "NOUN", "DET", "NOUN", "NOUN")
    assert text.phrases is None
    with pytest.raises(InputError, match="holds no words"):
        tagged("\n \n", Pipeline(), "mine")


def test_without_spacy_or_its_model(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the dog")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(InputError, match="needs spaCy: pip install spacy"):
        tag_text(tmp_path / "a.txt")

    def load(name, exclude):
        raise OSError(f"[E050] Can't find model {name!r}.")

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    with pytest.raises(InputError, match="python -m spacy download en_core_web_sm"):
        tag_text(tmp_path / "a.txt")


def test_tags_by_the_real_spacy(tmp_path):
    pytest.importorskip("spacy", reason="spaCy is not installed")
    pytest.importorskip("en_core_web_sm", reason="spaCy's model en_core_web_sm is not installed")
    (tmp_path / "a.txt").write_text("The dog doesn't bark.\n\nShe runs.")
    text = tag_text(tmp_path / "a.txt")
    assert text.words == ["The", "dog", "does", "n't", "bark", ".", "She", "runs", "."]
    assert text.tags == ("DT", "NN", "VBZ", "RB", "VB", ".", "PRP", "VBZ", ".")


def test_the_real_treebanks(research_data):
    """Counts of the data's own description; text against the newspaper's own (raw/)."""
    folder = research_data / "treebank"
    text = read_treebank(folder / "treebank.zip")
    assert len(text.tags) == 94_084
    assert len(set(text.tags)) == 45
    with zipfile.ZipFile(folder / "treebank.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".mrg"))
        raw = [archive.read(n.replace("combined", "raw")[:-4]).decode("latin-1") for n in names]
    documents = text.text.split("\n\n")
    assert len(documents) == len(raw) == 199
    ours = "".join(documents).replace(" ", "")
    theirs = re.sub(r"\.START|\s", "", "".join(raw))
    # Where both have the same characters, our spaces are the newspaper's.
    assert abs(len(ours) - len(theirs)) < 0.003 * len(theirs)
    same = sum(
        sentence in re.sub(r"\s+", " ", page)
        for document, page in zip(documents, raw, strict=True)
        for sentence in re.split(r"(?<=[a-z]\.) (?=[A-Z])", document)
    )
    total = sum(len(re.split(r"(?<=[a-z]\.) (?=[A-Z])", document)) for document in documents)
    assert same > 0.95 * total


@pytest.mark.slow
def test_the_real_brown_corpus(research_data):
    text = read_treebank(research_data / "treebank" / "brown.zip")
    assert len(text.tags) == 1_161_192
    assert len(set(text.tags)) == 472
    assert text.text.startswith("The Fulton County Grand Jury said Friday an investigation of")
