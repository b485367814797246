"""Writing an Orbax checkpoint block by block, so that memory holds one layer's tensor at a time.

Orbax saves trees of arrays that exist. `LazyArray` is a leaf that is produced while it is written,
and `_LazyArrayHandler` is Orbax's own NumPy handler with the single change that it writes the
blocks as they come. The result is an ordinary checkpoint that any Orbax reads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from convert.staging import deferred_interrupt

# Leaves up to this size are assembled in memory and stored as one file; larger ones block by block.
SMALL_LEAF_BYTES = 8 * 2**20
LARGEST_CHUNK_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is made while it is written.

    Attributes:
      shape: Of the whole array.
      dtype: Of the whole array.
      blocks: Yields the array along its first axis, in order, as NumPy arrays of `dtype`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, were it whole."""
        return self.size * self.dtype.itemsize

    def merged_blocks(self) -> Iterator[np.ndarray]:
        """The blocks, or all of them as one where the array is small."""
        if self.nbytes > SMALL_LEAF_BYTES:
            yield from self.blocks()
        else:
            yield np.concatenate(list(self.blocks()))

    def chunk_shape(self, first_axis: int) -> tuple[int, ...]:
        """Shape of one stored file, given how much of the first axis a block covers."""
        row_bytes = max(self.nbytes // self.shape[0], 1)
        return (max(min(first_axis, LARGEST_CHUNK_BYTES // row_bytes), 1), *self.shape[1:])


class _LazyArrayHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's NumPy handler for arrays that do not exist yet.

    Attributes:
      failure: What went wrong first. Orbax writes leaves concurrently and would leave the others
        hanging, so a failure is kept here, the remaining leaves are passed over, and the caller
        raises it.
    """

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._one_at_a_time = asyncio.Semaphore(1)
        self._interrupted = interrupted
        self.failure: BaseException | None = None

    async def _open_and_write(
        self, value: LazyArray, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        async with self._one_at_a_time:
            if self.failure is None:
                try:
                    await self._write_blocks(value, tspec, ts_context)
                except Exception as error:
                    self.failure = error

    async def _write_blocks(
        self, value: LazyArray, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        store, row = None, 0
        for block in value.merged_blocks():
            if self._interrupted():
                self.failure = KeyboardInterrupt()
                return
            if store is None:
                tspec["metadata"]["chunks"] = list(value.chunk_shape(len(block)))
                store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            await store[row : row + len(block)].write(block)
            row += len(block)
        if row != value.shape[0]:
            raise ValueError(f"blocks cover {row} of {value.shape[0]} rows.")


def write_tree(folder: Path, tree: dict[str, Any]) -> None:
    """Save a nested dict of `LazyArray` as an Orbax checkpoint.

    Args:
      folder: Absolute path that does not exist yet.
      tree: Leaves are `LazyArray`.

    Raises:
      Exception: The first failure to make or write a block; `folder` is then of no use.
      KeyboardInterrupt: It arrived while writing; it takes effect between two blocks.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    with deferred_interrupt() as interrupted:
        lazy = _LazyArrayHandler(interrupted)
        registry = ocp.type_handlers.create_type_handler_registry((LazyArray, lazy))
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=False, type_handler_registry=registry
        )
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
        except Exception:
            if lazy.failure is None:
                raise
        if lazy.failure is not None:
            raise lazy.failure
        if interrupted():
            raise KeyboardInterrupt
