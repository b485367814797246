"""Texts to evaluate on: two public data sets by name, or any local file.

====================  ==========================================================================
wikitext-103          validation split of `Salesforce/wikitext` (raw), rows joined by a blank line:
                      the recipe of the Hugging Face guide to perplexity
c4                    first documents of the validation split of `allenai/c4` (en), streamed,
                      joined by a blank line
.jsonl, .jsonl.gz,    the field "text" of each line, joined by a blank line
.json.gz
any other file        UTF-8 text as it stands; .gz is unpacked
====================  ==========================================================================
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qs_jax.errors import InputError

SEPARATOR = "\n\n"
_JSONL = (".jsonl", ".jsonl.gz", ".json.gz")


@dataclasses.dataclass(frozen=True)
class Text:
    """What is evaluated.

    Attributes:
      name: Of the data set, or the file's name without its folder.
      text: All of it.
      sha256: Of `text` in UTF-8.
      joined: How it was put together, in words.
      complete: False if more documents could have been taken.
    """

    name: str
    text: str
    sha256: str
    joined: str
    complete: bool = True


def read_text(data: str, limit_chars: int | None = None) -> Text:
    """Read a data set by name, or a local file.

    Args:
      data: "wikitext-103", "c4" or a path; `./c4` is a file of that name.
      limit_chars: "c4" only, which is too large to read whole: take documents until there are this
        many characters.

    Returns:
      The text and what identifies it.

    Raises:
      InputError: Neither a name nor a file; a file that is empty, damaged or not UTF-8, or a line
        without text; "c4" without a limit; the hub cannot be reached.
    """
    if data in HUB:
        text, joined, complete = HUB[data](limit_chars)
        return _described(data, text, joined, complete)
    path = Path(data)
    if path.is_dir():
        raise InputError(f"{data} is a folder; give one file.")
    if not path.exists():
        raise InputError(
            f"unknown data {data!r}: there is no such file, and the known names are "
            f"{', '.join(HUB)}."
        )
    if path.name.endswith(_JSONL):
        documents = list(_json_texts(path))
        joined = f"{len(documents)} lines, field 'text', joined by a blank line"
        return _described(path.name, SEPARATOR.join(documents), joined)
    return _described(path.name, _decoded(_content(path), path), "one file as it stands")


def _described(name: str, text: str, joined: str, complete: bool = True) -> Text:
    if not text:
        raise InputError(f"{name} is empty: there is nothing to score.")
    try:
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds half of a surrogate pair, which is no text.") from error
    return Text(name, text, digest, joined, complete)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}.") from error


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}."
        ) from error


def json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """What stands on each line of a JSON Lines file, with its number; blank lines are skipped.

    Raises:
      InputError: The file is not UTF-8, a damaged gzip, or a line is not JSON.
    """
    for number, line in enumerate(_decoded(_content(path), path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}.") from error
        yield number, record


def _json_texts(path: Path) -> Iterator[str]:
    """The field "text" of each line; blank lines hold no document."""
    for number, record in json_records(path):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f'{path}, line {number} has no "text" field that holds a string.')
        yield record["text"]


def _wikitext(limit_chars: int | None) -> tuple[str, str, bool]:
    del limit_chars  # a megabyte: always whole
    rows = _from_hub("Salesforce/wikitext", "wikitext-103-raw-v1", list)
    return SEPARATOR.join(rows), f"{len(rows)} rows joined by a blank line", True


def _c4(limit_chars: int | None) -> tuple[str, str, bool]:
    if limit_chars is None:
        raise InputError("c4 is too large to score whole: say how much with --limit-windows N.")

    def take(documents: Iterable[str]) -> tuple[list[str], bool]:
        taken, characters = [], 0
        for document in documents:
            taken.append(document)
            characters += len(document) + len(SEPARATOR)
            if characters - len(SEPARATOR) >= limit_chars:
                return taken, False
        return taken, True

    taken, complete = _from_hub("allenai/c4", "en", take, streaming=True)
    return SEPARATOR.join(taken), f"first {len(taken)} documents joined by a blank line", complete


def _from_hub(repo: str, config: str, take: Callable[[Iterable[str]], Any], **options: Any) -> Any:
    """What `take` makes of the documents of a validation split."""
    return hub_rows(
        repo, config, "validation", lambda rows: take(row["text"] for row in rows), **options
    )


def hub_rows(
    repo: str, config: str, split: str, take: Callable[[Iterable[Any]], Any], **options: Any
) -> Any:
    """What `take` makes of the rows of a data set on the Hugging Face Hub.

    Args:
      repo: Of the data set.
      config: Its configuration.
      split: Its split.
      take: Gets the rows; what it returns must not need the connection.
      **options: Of `datasets.load_dataset`.

    Raises:
      InputError: The hub cannot be reached, or has no such data.
    """
    import datasets

    try:
        return take(datasets.load_dataset(repo, config, split=split, **options))
    except Exception as error:  # the hub, its HTTP client and pyarrow raise many kinds
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{repo} could not be read from the Hugging Face Hub ({type(error).__name__}: "
            f"{reason}). Without a connection, download it elsewhere and give a local file."
        ) from error


HUB: dict[str, Callable[[int | None], tuple[str, str, bool]]] = {
    "wikitext-103": _wikitext,
    "c4": _c4,
}
