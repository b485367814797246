"""Writing an Orbax checkpoint block by block, so that memory holds one layer's tensor at a time.

Orbax saves trees of arrays that exist. `LazyArray` is a leaf that is produced while it is written.
The result is an ordinary checkpoint that any Orbax reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from convert.errors import ConversionError
from qs_jax.checkpoint import MANIFEST

# Leaves up to this size are assembled in memory and stored as one file; larger ones block by block.
SMALL_LEAF_BYTES = 8 * 2**20
LARGEST_CHUNK_BYTES = 64 * 2**20
# What operating systems put into folders, beside hidden files.
_OF_SYSTEMS = ("Thumbs.db", "desktop.ini", "Icon\r")


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is made while it is written, in blocks along its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.size * self.dtype.itemsize


class _LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's NumPy handler for arrays that do not exist yet.

    Orbax would leave other leaves hanging if one failed. The first failure is therefore stored, the
    remaining leaves are passed over, and the caller raises it.
    """

    def __init__(self, interrupted: threading.Event) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._one_at_a_time = asyncio.Semaphore(1)
        self._interrupted = interrupted
        self.failure: BaseException | None = None

    async def _open_and_write(self, value: LazyArray, *args: Any) -> None:
        async with self._one_at_a_time:
            if self.failure is None:
                try:
                    await self._write_blocks(value, *args)
                except (Exception, KeyboardInterrupt) as error:
                    self.failure = error

    async def _write_blocks(self, value: LazyArray, tspec: Any, ts_context: ts.Context) -> None:
        blocks = value.blocks()
        if value.nbytes <= SMALL_LEAF_BYTES:
            blocks = iter([np.concatenate(list(blocks))])
        store, row = None, 0
        for block in blocks:
            if self._interrupted.is_set():
                raise KeyboardInterrupt
            if store is None:
                rows = LARGEST_CHUNK_BYTES // max(value.nbytes // value.shape[0], 1)
                chunk = [max(min(len(block), rows), 1), *value.shape[1:]]
                tspec["metadata"]["chunks"] = chunk
                store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            await store[row : row + len(block)].write(block)
            row += len(block)


def check_folder(target: Path, overwrite: bool | None = None, source: str = "") -> None:
    """Refuse a target that exists, unless it is a converted checkpoint that may be overwritten.

    `overwrite` is None where the caller has no such option. What is replaced must not hold the
    source.
    """
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    if not existing.is_dir():
        raise ConversionError(f"{existing} exists and is not a folder.")
    if not os.access(existing, os.W_OK):
        raise ConversionError(f"{existing}: there is no permission to write in it.")
    if existing == target and os.path.ismount(target):
        raise ConversionError(f"{target} is a mount point, which cannot be renamed: add a name.")
    found = [path.name for path in existing.iterdir() if existing == target]
    if all(name.startswith(".") or name in _OF_SYSTEMS for name in found):
        return
    if not overwrite:
        hint = "." if overwrite is None else "; pass --overwrite to replace it."
        raise ConversionError(f"{target} exists{hint}")
    if not (target / MANIFEST).is_file():
        raise ConversionError(f"{target} is not a converted checkpoint; not overwriting it.")
    if target in Path(os.path.realpath(source)).parents:
        raise ConversionError(f"{target} holds {source}: name another --out.")


def write_tree(folder: Path, tree: dict[str, Any]) -> None:
    """Save a nested dict of `LazyArray` as an Orbax checkpoint in a new folder.

    Raises the first failure to make or write a block; KeyboardInterrupt takes effect between two.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    with _deferred_interrupt() as interrupted:
        lazy = _LazyArrayHandler(interrupted)
        registry = ocp.type_handlers.create_type_handler_registry((LazyArray, lazy))
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=False, type_handler_registry=registry
        )
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
        except Exception as error:
            lazy.failure = lazy.failure or error
        if isinstance(lazy.failure, RuntimeError | ValueError):  # Orbax's and TensorStore's
            raise OSError(f"{lazy.failure}") from lazy.failure
        if lazy.failure is not None:
            raise lazy.failure
        if interrupted.is_set():
            raise KeyboardInterrupt


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Set an event on Ctrl-C, which the main thread receives, while a library's threads write."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
