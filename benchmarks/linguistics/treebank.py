"""Reading the Penn Treebank's `combined/*.mrg`, as NLTK gives them out.

NLTK reads the trees; empty elements (-NONE-) and what holds nothing else go, function suffixes
(NP-SBJ, NP=2) go. A file of which a word would be lost, such as a bracket not written as -LRB-, is
refused.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

import nltk

from benchmarks.linguistics.text import Phrase, TaggedText, print_words
from qs_jax.errors import InputError
from qs_jax.evaluation.datasets import decode_text


def read_treebank(path: Path) -> TaggedText:
    """Read a treebank as one text, documents in the order of their names.

    Sentences are joined by a space, documents by a blank line.

    Args:
      path: Zip file or folder with Penn Treebank trees (`*.mrg`).

    Raises:
      InputError: There are no trees, or a file is damaged: brackets that do not match, a word
        without a tag, a tag without a word. The message names the file.
    """
    text, spans, tags, phrases = "", [], [], []
    for name, content in sorted(_read_files(path).items()):
        gap = "\n\n" if text else ""
        try:
            trees = map(nltk.Tree.fromstring, nltk.SExprTokenizer().tokenize(content.strip()))
            sentences = [flatten_tree(tree) for tree in trees]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name} is damaged: {' '.join(str(error).split())}") from error
        for words, own_tags, own_phrases in sentences:
            if words:
                shown, own_spans = print_words(words)
                text += gap
                spans += [(len(text) + start, len(text) + end) for start, end in own_spans]
                phrases += [Phrase(x, len(tags) + i, len(tags) + j) for x, i, j in own_phrases]
                tags += own_tags
                text += shown
                gap = " "
    if not tags:
        raise InputError(f"{path} holds no trees with words (*.mrg).")
    return TaggedText(path.name, text, tuple(spans), tuple(tags), tuple(phrases))


def flatten_tree(tree: nltk.Tree) -> tuple[list[str], list[str], list[Phrase]]:
    """Words, tags, and constituents (outer before inner) of a tree.

    Raises:
      ValueError: A word without a tag of its own, or a tag without a word.
    """
    words: list[str] = []
    tags: list[str] = []
    phrases: list[Phrase] = []

    def collect(node: nltk.Tree) -> None:
        if len(node) == 1 and isinstance(node[0], str):
            if node.label() != "-NONE-":
                words.append(node[0])
                tags.append(node.label())
            elif node[0] != "0" and not node[0].startswith("*"):  # as in *T*-1
                raise ValueError(f"the word {node[0]!r} has the tag of empty elements, -NONE-.")
            return
        if not node:
            raise ValueError(f"({node.label()} ) has no word; a bracket is -LRB- or -RRB-.")
        first, place = len(words), len(phrases)
        for child in node:
            if isinstance(child, str):
                raise ValueError(f"the word {child!r} has no tag of its own.")
            collect(child)
        label = re.split(r"[-=|]", node.label())[0]
        if label and len(words) > first:
            phrases.insert(place, Phrase(label, first, len(words)))

    collect(tree)
    return words, tags, phrases


def _read_files(path: Path) -> dict[str, str]:
    """Text of the tree files in a zip file or a folder, by their names in it."""
    try:
        if path.is_dir():
            files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.mrg")}
        else:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".mrg")]
                files = {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{path} is no whole zip file: {error}.") from error
    # macOS keeps facts about each file in another whose name begins with a full stop.
    return {n: decode_text(files[n], n) for n in files if not Path(n).name.startswith(".")}
