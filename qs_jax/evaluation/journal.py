"""The journal of a run that can be killed and continued.

Finished batches go to `OUT.partial`, one JSON line each, behind a first line with the run's
identity. `OUT` itself appears as the last step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from qs_jax.errors import InputError, OutputError
from qs_jax.files import parse_json, read_json


def partial_path(out: Path) -> Path:
    """Journal of an unfinished run."""
    return out.parent / f"{out.name}.partial"


def is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Whether the results of this run are there; "versions" and "git" play no part."""
    if not out.exists():
        return False
    here = {name: identity[name] for name in identity if name not in ("versions", "git")}
    try:
        results = read_json(out)
        there = {name: results[name] for name in here}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{out} is not a results file of this command; name another --out. Nothing was changed."
        ) from error
    _require_same(out, there, here)
    return True


class Journal:
    """Finished batches of a run, on disk as soon as they are added; the first makes the file."""

    def __init__(self, out: Path, identity: dict[str, Any], *, resume: bool = False) -> None:
        self.path = partial_path(out)
        self.entries: list[dict[str, Any]] = []
        self._identity = identity
        if resume and self.path.exists():
            self._read()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt and self.entries:
            print(f"finished batches are in {self.path}; --resume goes on", file=sys.stderr)

    def append(self, entry: dict[str, Any]) -> None:
        """Add a finished batch; it is on disk when this returns."""
        line = _line(entry)
        if self.entries:
            _write(self.path, "ab", line)
        else:
            _write(self.path, "wb", _line(self._identity) + line)
        self.entries.append(json.loads(line))

    def remove(self) -> None:
        """Delete the file, once the results are written."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        """Take over the batches in the file, without a last line that was being written."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return
        try:
            identity, *entries = map(parse_json, whole.decode("utf-8").splitlines())
            if not all(isinstance(entry, dict) for entry in (identity, *entries)):
                raise ValueError("a line is not an object")
        except ValueError as error:
            raise InputError(
                f"{self.path} is damaged ({error}): pass --overwrite. Nothing was changed."
            ) from error
        _require_same(self.path, identity, self._identity)
        os.truncate(self.path, len(whole))
        self.entries = entries


def _require_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse to go on with the file of another run, naming the fields that differ."""
    old, new = (flatten_dict(each, sep=".") for each in (there, json.loads(_line(here))))
    changes = [
        f"{name} is {json.dumps(old.get(name))}, now {json.dumps(new.get(name))}"
        for name in {**new, **old}
        if old.get(name) != new.get(name)
    ]
    if changes:
        more = f"; and {len(changes) - 6} more" if len(changes) > 6 else ""
        raise InputError(
            f"{path} is from another configuration: {'; '.join(changes[:6])}{more}. Nothing was "
            "changed: give the same options, another --out, or --overwrite."
        )


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode("ascii") + b"\n"


def _write(path: Path, mode: str, content: bytes) -> None:
    """Write, and wait until it is on disk."""
    try:
        with path.open(mode) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path}: {error}. Free some space; --resume goes on.") from error
