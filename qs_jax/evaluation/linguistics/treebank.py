"""Reading treebanks: the Penn Treebank's `combined/*.mrg`, and the Brown corpus's tagged text.

From a folder or a zip file as NLTK gives them out (`python -m nltk.downloader treebank brown`).
Trees are read by `nltk.tree.Tree`; empty elements (-NONE-) and what holds nothing else go, function
suffixes (NP-SBJ, NP=2) go. Where a Penn file has its `tagged/*.pos` beside it, both must have the
same words.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qs_jax.errors import InputError
from qs_jax.evaluation.linguistics.spans import BRACKETS, Phrase, Sentence, TaggedText, join
from qs_jax.evaluation.linguistics.tags import read_map, universal_tags

_BROWN_FILE = re.compile(r"c[a-r]\d\d")
_MAPS = {"penn": "en-ptb.map", "brown": "en-brown.map"}
_EMPTY = "-NONE-"


def require_nltk() -> Any:
    """NLTK.

    Raises:
      InputError: It is not installed.
    """
    try:
        import nltk
    except ImportError as error:
        raise InputError(
            'reading treebanks needs NLTK: pip install "qs-jax[linguistics]".'
        ) from error
    return nltk


def read_treebank(path: Path, tag_map: Path | None = None) -> TaggedText:
    """Read a treebank as one text, documents in the order of their names.

    Args:
      path: Zip file or folder with Penn Treebank trees (`*.mrg`), or else with Brown's files.
      tag_map: From the corpus's tags to the 12 universal ones; by default `en-ptb.map` or
        `en-brown.map` in the folder `universal_tagset` beside `path`, in it, or in NLTK's data.

    Returns:
      Its text with words, tags and, for the Penn Treebank, constituents.

    Raises:
      InputError: There is no treebank there or no tag map, or a file is damaged: brackets that do
        not match, a word without a tag, an unknown tag, a tagged file with other words. The
        message names the file and the line or tree.
    """
    require_nltk()
    files = _files(path)
    trees = {name: content for name, content in files.items() if name.endswith(".mrg")}
    tagged = {
        name: content
        for name, content in files.items()
        if _BROWN_FILE.fullmatch(PurePosixPath(name).name)
    }
    if not trees and not tagged:
        raise InputError(
            f"{path} holds no treebank: neither trees (*.mrg) nor files of the Brown corpus "
            f"(ca01, ...) among its {len(files)} files."
        )
    tag_set = "penn" if trees else "brown"
    mapping = read_map(tag_map or _find_map(path, tag_set))
    documents, universal = [], []
    for name, content in sorted((trees or tagged).items()):
        text = _decoded(content, name)
        read = read_penn(text, name) if trees else read_brown(text, name)
        sentences = list(read)
        beside = _tagged_beside(name, files) if trees else None
        if beside is not None:
            check_tagged(sentences, _decoded(files[beside], beside), name, beside)
        for sentence in sentences:
            universal += universal_tags(sentence.words, sentence.tags, mapping, sentence.source)
        documents.append(sentences)
    if not universal:
        raise InputError(f"{path}: its {len(documents)} files hold no words.")
    return join(documents, universal, name=path.name, tag_set=tag_set)


def read_penn(text: str, name: str) -> Iterator[Sentence]:
    """The sentences of a file of bracketed trees.

    Raises:
      InputError: As `read_treebank`.
    """
    nltk = require_nltk()
    for number, (line, tree) in enumerate(_split_trees(text, name), start=1):
        source = f"{name}, tree {number} (line {line})"
        try:
            parsed = nltk.tree.Tree.fromstring(tree)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{source} is no tree: {reason}") from error
        words: list[str] = []
        tags: list[str] = []
        phrases: list[Phrase] = []
        _collect(parsed, words, tags, phrases, source)
        if words:
            yield Sentence(tuple(words), tuple(tags), tuple(phrases), source)


def _collect(
    tree: Any, words: list[str], tags: list[str], phrases: list[Phrase], source: str
) -> None:
    """Append a tree's words and tags, and its constituents, outer before inner."""
    leaves = [child for child in tree if isinstance(child, str)]
    if leaves and len(tree) == 1:
        if tree.label() != _EMPTY:
            words.append(leaves[0])
            tags.append(tree.label())
        return
    if leaves:
        raise InputError(f"{source}: the word {leaves[0]!r} has no tag of its own.")
    first, place = len(words), len(phrases)
    for child in tree:
        _collect(child, words, tags, phrases, source)
    label = re.split(r"[-=|]", tree.label())[0]
    if label and len(words) > first:
        phrases.insert(place, Phrase(label, first, len(words)))


def _split_trees(text: str, name: str) -> Iterator[tuple[int, str]]:
    """Line and text of each bracketed expression."""
    depth = start = end = 0

    def line_of(character: int) -> int:
        return text.count("\n", 0, character) + 1

    for match in re.finditer(r"[()]", text):
        if depth == 0 and text[end : match.start()].strip():
            break
        if match[0] == "(":
            start = start if depth else match.start()
            depth += 1
            continue
        if depth == 0:
            raise InputError(
                f"{name}, line {line_of(match.start())}: a closing bracket without its opening one."
            )
        depth -= 1
        end = match.end()
        if depth == 0:
            yield line_of(start), text[start:end]
    if depth:
        raise InputError(
            f"{name}, line {line_of(start)}: the tree that begins here lacks {depth} closing "
            f"bracket{'s' if depth > 1 else ''}."
        )
    if rest := text[end:].split():
        line = line_of(text.index(rest[0], end))
        raise InputError(f"{name}, line {line}: {rest[0]!r} stands outside of a tree.")


def read_brown(text: str, name: str) -> Iterator[Sentence]:
    """The sentences of a file of the Brown corpus: word/tag, a sentence on each line.

    Raises:
      InputError: A word without a tag.
    """
    nltk = require_nltk()
    for number, line in enumerate(text.splitlines(), start=1):
        pairs = [nltk.tag.str2tuple(token) for token in line.split()]
        for token, (word, tag) in zip(line.split(), pairs, strict=True):
            if not word or not tag:
                raise InputError(f"{name}, line {number}: {token!r} is not word/tag.")
        if pairs:
            words, tags = zip(*pairs, strict=True)
            yield Sentence(words, tags, (), f"{name}, line {number}")


def check_tagged(sentences: list[Sentence], tagged: str, name: str, beside: str) -> None:
    """Compare the words of the trees with those of the tagged file.

    Tags are not compared: the trees' are corrected ones. The tagged file may go on after the last
    tree (closing quotation marks, sources), and the full stop of an abbreviation that ends a
    sentence is written once.

    Raises:
      InputError: At the first word that differs, with both places.
    """
    nltk = require_nltk()
    there = [
        (number, nltk.tag.str2tuple(token)[0])
        for number, line in enumerate(tagged.splitlines(), start=1)
        if not line.startswith("===")
        for token in line.split()
        if token not in ("[", "]")
    ]
    place = 0
    for sentence in sentences:
        for word in sentence.words:
            if place == len(there):
                raise InputError(f"{beside} ends before {word!r} of {sentence.source}.")
            line, other = there[place]
            if _plain(word) != _plain(other):
                raise InputError(
                    f"{beside}, line {line} has {other!r} where {sentence.source} has {word!r}: "
                    "the tagged and the parsed file do not match."
                )
            place += 1
    if not sentences and there:
        raise InputError(f"{name} has no trees, but {beside} has words.")


def _plain(word: str) -> str:
    word = BRACKETS.get(word, word)
    return word.removesuffix(".") or word


def _tagged_beside(name: str, files: Mapping[str, bytes]) -> str | None:
    path = PurePosixPath(name)
    beside = path.parent.parent / "tagged" / f"{path.stem}.pos"
    return str(beside) if str(beside) in files else None


def _files(path: Path) -> dict[str, bytes]:
    """Content of all files of a zip file or a folder, by their names in it."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        wanted = [f for f in found if f.suffix in (".mrg", ".pos") or _BROWN_FILE.match(f.name)]
        return {file.relative_to(path).as_posix(): file.read_bytes() for file in wanted}
    if not path.exists():
        raise InputError(f"{path} does not exist; give a treebank's zip file or folder.")
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                entry.filename: archive.read(entry)
                for entry in archive.infolist()
                if not entry.is_dir()
            }
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path} is not a whole zip file: {error}.") from error


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}, line {line} is not UTF-8 text.") from error


def _find_map(path: Path, tag_set: str) -> Path:
    """The tag map of a tag set, in the usual places."""
    name = _MAPS[tag_set]
    for folder in (path, path.parent):
        if (folder / "universal_tagset" / name).is_file():
            return folder / "universal_tagset" / name
    try:
        return Path(str(require_nltk().data.find(f"taggers/universal_tagset/{name}")))
    except LookupError as error:
        raise InputError(
            f"there is no {name} in a folder universal_tagset beside {path.name}, nor in NLTK's "
            "data: give --tag-map, or run python -m nltk.downloader universal_tagset."
        ) from error
