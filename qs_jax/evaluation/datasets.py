"""Texts to evaluate on: two public data sets by name, or any local file.

====================  ==========================================================================
wikitext-103          validation split of `Salesforce/wikitext` (raw): the recipe of the Hugging
                      Face guide to perplexity
c4                    first documents of the validation split of `allenai/c4` (en), streamed
.jsonl, .json,        the field "text" of each line
.jsonl.gz, .json.gz
any other file        UTF-8 text as it stands; .gz is unpacked
====================  ==========================================================================

Documents are joined by a blank line. The names need the extra `data`; files need nothing.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from qs_jax.errors import InputError
from qs_jax.files import parse_json

SEPARATOR = "\n\n"
# One word with a path or a suffix, or any line with a usual suffix of texts.
_FILE_NAME = re.compile(
    r"\S*/\S*|\S+\.[A-Za-z0-9]{1,6}"
    r"|.+\.(txt|md|jsonl?|gz|csv|tsv|html|py|tex|log|rst)",
    re.IGNORECASE,
)
HUB = {"wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1"), "c4": ("allenai/c4", "en")}


@dataclasses.dataclass(frozen=True)
class Text:
    """A text of several documents with its origin, a data set's or a file's name."""

    name: str
    text: str
    sha256: str
    documents: int


def read_text(data: str, limit_chars: int | None = None) -> Text:
    """Read a data set by name, or a local file; of "c4" documents until `limit_chars` characters.

    Raises:
      InputError: The data cannot be read, or hold no text; a name is also that of a file.
    """
    if is_name(data, HUB):
        return _text(data, _hub_documents(data, limit_chars))
    return _read_file(Path(data))


def is_name(value: str, names: Collection[str]) -> bool:
    """Whether a value is one of these names, and not a file or folder, which InputError says."""
    if value in names and Path(value).exists():
        raise InputError(
            f"{value} is a name that this option knows, and a file or folder here: write ./{value} "
            "for the file or folder; for the name, run in another folder."
        )
    return value in names


def read_text_or_file(value: str) -> Text:
    """Read the file that a value names, or standard input for "-"; else the value is the text.

    Raises:
      InputError: The value names a folder, or looks like the name of a file that is not there; the
        file or standard input cannot be read, or holds no text.
    """
    advice = "give a file, or - with the text on standard input."
    if value == "-":
        return _text("standard input", [read_stdin()])
    try:
        path = Path(value) if value and Path(value).exists() else None
    except (OSError, ValueError):  # no name: too long, or with a null
        path = None
    if path is not None:
        if path.is_dir():
            raise InputError(f"{value} is a folder: {advice}")
        return _read_file(path)
    if _FILE_NAME.fullmatch(value):
        raise InputError(f"{value} looks like the name of a file, and there is none: {advice}")
    return _text("the text", [value])


def read_stdin() -> str:
    """All of standard input."""
    try:
        if sys.stdin is None:  # closed before the program started
            raise OSError("it is closed")
        text = sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8: {error}.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"standard input cannot be read: {error}.") from error
    if not text:
        raise InputError("standard input is empty.")
    return text


def _text(name: str, documents: list[str]) -> Text:
    text = SEPARATOR.join(documents)
    if not text.strip():
        raise InputError(f"{name} is empty or blank: there is nothing to score.")
    try:
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds half of a surrogate pair, which is no text.") from error
    return Text(name, text, digest, len(documents))


def _read_file(path: Path) -> Text:
    if path.is_dir() or not path.exists():
        reason = "is a folder" if path.is_dir() else "is no file"
        raise InputError(f"{path} {reason}; give one file. The known names are {', '.join(HUB)}.")
    lines = path.name.lower().removesuffix(".gz").endswith((".jsonl", ".json"))
    return _text(path.name, list(_json_texts(path)) if lines else [_decode(path)])


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}.") from error
    return decode_text(content, str(path))


def decode_text(content: bytes, name: str) -> str:
    """UTF-8 text of a file, without the mark that some editors put before it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
        raise InputError(f"{name} is {what} text: {error}. Save it as UTF-8.") from error
    if "\0" in text:
        raise InputError(f"{name} holds null bytes: it is UTF-16, or no text. Save it as UTF-8.")
    return text


def json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Values of a JSON Lines file, each with the number of its line; blank lines are skipped."""
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        try:
            if line.strip():
                yield number, _check_texts(parse_json(line))
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}.") from error


def _check_texts(record: Any) -> Any:
    """The record, whose texts hold no half of a surrogate pair."""
    for text in record.values() if isinstance(record, dict) else ():
        if isinstance(text, str):
            text.encode("utf-8")
    return record


def _json_texts(path: Path) -> Iterator[str]:
    for number, record in json_records(path):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f'{path}, line {number} has no "text" field that holds a string.')
        yield record["text"]


def _hub_documents(name: str, limit_chars: int | None) -> list[str]:
    streaming = name == "c4"
    limit = limit_chars if streaming else math.inf  # the other is a megabyte: always whole
    if limit is None:
        raise InputError("c4 is too large to score whole: say how much with --limit-windows N.")

    def take(rows: Iterable[Any]) -> list[str]:
        documents, characters = [], -len(SEPARATOR)
        for row in rows:
            documents.append(row["text"])
            characters += len(row["text"]) + len(SEPARATOR)
            if characters >= limit:
                break
        return documents

    return hub_rows(*HUB[name], "validation", take, streaming=streaming)


def hub_rows(
    repo: str, config: str, split: str, take: Callable[[Iterable[Any]], Any], **options: Any
) -> Any:
    """What `take` makes of the rows of a data set on the Hugging Face Hub."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{repo} is read with datasets: pip install 'qs-jax[data]', or give a local file."
        ) from error
    try:
        return take(datasets.load_dataset(repo, config, split=split, **options))
    except Exception as error:  # the hub, its HTTP client and pyarrow raise many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{repo} could not be read from the Hugging Face Hub ({reason}): give a local file."
        ) from error
