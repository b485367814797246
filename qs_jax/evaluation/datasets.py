"""Texts to evaluate on: two public data sets by name, or any local file.

====================  ==========================================================================
wikitext-103          validation split of `Salesforce/wikitext` (raw): the recipe of the Hugging
                      Face guide to perplexity
c4                    first documents of the validation split of `allenai/c4` (en), streamed
.jsonl, .jsonl.gz,    the field "text" of each line
.json.gz
any other file        UTF-8 text as it stands; .gz is unpacked
====================  ==========================================================================

Documents are joined by a blank line. The names need the extra `data`; files need nothing.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from qs_jax.errors import InputError

SEPARATOR = "\n\n"
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
      InputError: The data cannot be read, or hold no text.
    """
    path = Path(data)
    if data in HUB:
        documents = _hub_documents(data, limit_chars)
    elif path.is_dir() or not path.exists():
        reason = "is a folder" if path.is_dir() else "is no file"
        raise InputError(f"{data} {reason}; give one file. The known names are {', '.join(HUB)}.")
    elif path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        documents = list(_json_texts(path))
    else:
        documents = [_decode(path)]
    text = SEPARATOR.join(documents)
    if not text:
        raise InputError(f"{path.name} is empty: there is nothing to score.")
    try:
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise InputError(f"{data} holds half of a surrogate pair, which is no text.") from error
    return Text(path.name, text, digest, len(documents))


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        return content.decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file: {error}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error


def json_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Values of a JSON Lines file, each with the number of its line; blank lines are skipped."""
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        try:
            if line.strip():
                yield number, json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON: {error}.") from error


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
