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


def check_target(target: Path, overwrite: bool = False, marker: str | None = None) -> None:
    """Refuse a target that exists, unless it may be overwritten.

    Args:
      target: Folder to be written.
      overwrite: Allow a folder that exists, if it holds `marker`.
      marker: File that shows that the folder is one of ours.

    Raises:
      ConversionError: The target may not be written.
    """
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} exists and is not a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        hint = "; pass --overwrite to replace it." if marker else "."
        raise ConversionError(f"{target} exists{hint}")
    if marker is not None and not (target / marker).is_file():
        raise ConversionError(f"{target} is not a converted checkpoint; not overwriting it.")


@contextlib.contextmanager
def staging(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` on success and vanishes on failure.

    What a killed process left behind for the same target is removed first.

    Raises:
      ConversionError: Writing failed; `target` is as it was.
    """
    staged = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        staged.mkdir()
        yield staged
        if overwrite and target.is_dir():
            old = target.parent / f".{target.name}.replaced-{os.getpid()}"
            target.rename(old)
            staged.rename(target)
            shutil.rmtree(old)
        else:
            staged.rename(target)
    except ConversionError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"writing {target} failed, nothing was kept: {error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove_abandoned(target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.partial-*"):
        pid = left.name.rpartition("-")[2]
        if not (pid.isdigit() and psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
