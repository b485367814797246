"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from convert.errors import ConversionError
from qs_jax.checkpoint import MANIFEST


def check_target(target: Path, overwrite: bool | None = None) -> None:
    """Refuse a target that exists, unless it is a converted checkpoint that may be overwritten.

    `overwrite` is None where the caller has no such option.
    """
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} exists and is not a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        hint = "." if overwrite is None else "; pass --overwrite to replace it."
        raise ConversionError(f"{target} exists{hint}")
    if not (target / MANIFEST).is_file():
        raise ConversionError(f"{target} is not a converted checkpoint; not overwriting it.")


@contextlib.contextmanager
def staging(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` on success and vanishes on failure.

    Folders that a killed process left behind for the same target are cleared up first. `target` is
    an absolute path without symbolic links; where it exists it is replaced as the last step.
    """
    staged = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(target)
        staged.mkdir()
        yield staged
        _move_into_place(staged, target, overwrite)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if isinstance(error, OSError | ValueError | RuntimeError):
            raise ConversionError(f"writing {target} failed, nothing was kept: {error}") from error
        raise


def _move_into_place(staged: Path, target: Path, overwrite: bool) -> None:
    if not (overwrite and target.is_dir()):
        staged.rename(target)
        return
    old = target.parent / f".{target.name}.replaced-{os.getpid()}"
    target.rename(old)
    try:
        staged.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _clear_abandoned(target: Path) -> None:
    """Clear up after killed processes: half-built folders, and an old target moved aside."""
    for kind in ("partial", "replaced"):
        for left in target.parent.glob(f".{target.name}.{kind}-*"):
            pid = left.name.rpartition("-")[2]
            if pid.isdigit() and psutil.pid_exists(int(pid)):
                continue
            if kind == "replaced" and not target.exists():
                left.rename(target)
            else:
                shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
