"""A long run that can be killed and continued, and the file it writes.

Finished batches go to `OUT.partial`, one JSON line each, behind a first line that says what the run
is. `OUT` itself appears whole, as the last step. Nothing that exists is replaced unasked.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from qs_jax.errors import InputError

_SHOWN = 6


def check_target(
    out: Path, *, overwrite: bool = False, resume: bool | None = None, option: str = "--out"
) -> None:
    """Refuse a target that cannot be written, or that exists and may not be replaced.

    Args:
      out: File to be written.
      overwrite: The caller may replace what exists.
      resume: The caller will continue a run, or find it complete; None where it cannot.
      option: What names the target.

    Raises:
      InputError: With what to do.
    """
    if resume and overwrite:
        raise InputError("--resume continues a run and --overwrite starts it anew: give one.")
    if out.is_dir():
        raise InputError(f"{option} {out} is a folder; name a file in it.")
    if not out.parent.is_dir():
        raise InputError(f"{option} {out}: there is no folder {out.parent}.")
    if resume or overwrite:
        return
    advice = f"name another {option}, or pass --overwrite"
    if resume is not None:
        advice += " to start anew or --resume to go on where it stands"
    for path, state in ((out, "exists"), (partial_path(out), "is left from an unfinished run")):
        if path.exists():
            raise InputError(f"{path} {state}: {advice}. Nothing was changed.")


def partial_path(out: Path) -> Path:
    """Where the finished batches of an unfinished run are."""
    return out.with_name(out.name + ".partial")


def is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Whether the results of this run are there already.

    Args:
      out: Results file; it may be missing.
      identity: What the run is. A results file holds it at its top level; where the code stood
        ("versions", "git") plays no part.

    Raises:
      InputError: The file is of another configuration, or no results file.
    """
    if not out.exists():
        return False
    names = [name for name in identity if name not in ("versions", "git")]
    try:
        results = json.loads(out.read_text(encoding="utf-8"))
        there = {name: results[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{out} is not a results file of this command; name another --out. Nothing was changed."
        ) from error
    _require_same(out, there, {name: identity[name] for name in names})
    return True


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON; the file appears whole or not at all.

    Raises:
      ValueError: The content holds NaN or infinity.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            _flush(file)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


class Journal:
    """Finished batches of a run, on disk as soon as they are added.

    The file is touched by the first `append`, so that a run which fails before it leaves nothing.

    Attributes:
      path: The file.
      entries: All batches so far; what was read back and what was appended look the same.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, resume: bool = False) -> None:
        self.path = partial_path(out)
        self.entries: list[dict[str, Any]] = []
        self._file: Any = None
        self._identity = json.loads(_line(identity))
        self._kept = self._read() if resume and self.path.exists() else 0

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if kind is KeyboardInterrupt and self.entries:
            print(f"finished batches are in {self.path}; --resume goes on", file=sys.stderr)

    def append(self, entry: dict[str, Any]) -> None:
        """Add a finished batch; it is on disk when this returns."""
        if self._file is None:
            self._file = self.path.open("r+b" if self._kept else "wb")
            self._file.truncate(self._kept)
            self._file.seek(self._kept)
            if not self._kept:
                self._file.write(_line(self._identity))
        line = _line(entry)
        self._file.write(line)
        _flush(self._file)
        self.entries.append(json.loads(line))

    def remove(self) -> None:
        """Delete the file, once the results are written."""
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)

    def _read(self) -> int:
        """Take over the batches in the file; returns the bytes that are whole.

        A last line without its end was being written when the run was killed: it is dropped.
        """
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return 0
        try:
            identity, *entries = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
            if not all(isinstance(entry, dict) for entry in (identity, *entries)):
                raise ValueError("a line is not an object")
        except ValueError as error:
            raise InputError(
                f"{self.path} is damaged ({error}): pass --overwrite to start anew. Nothing was "
                "changed."
            ) from error
        _require_same(self.path, identity, self._identity)
        self.entries = entries
        return len(whole)


def _require_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse to go on with the file of another run.

    Raises:
      InputError: Naming the fields that differ.
    """
    old, new = (flatten_dict(each, sep=".") for each in (there, json.loads(_line(here))))
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    if not names:
        return
    changes = [f"{n} is {_short(old.get(n))}, now {_short(new.get(n))}" for n in names[:_SHOWN]]
    changes += [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    raise InputError(
        f"{path} is from another configuration: {'; '.join(changes)}. Nothing was changed: give "
        "the same options, another --out, or --overwrite."
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode("ascii") + b"\n"


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
