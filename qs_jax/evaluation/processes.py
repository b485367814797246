"""One evaluation in several processes, each on its own share of the batches (`jax.distributed`).

Process i of n scores batches i, i + n, i + 2n, ... of the same windows and keeps its own journal.
At the end the entries are exchanged, and process 0 writes what one process would have written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qs_jax.errors import ConfigError, InputError

# A process that has been silent for so long is given up, and the others end with an error.
HEARTBEAT_SECONDS = 20
CONNECT_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Processes:
    """Number of this process, from 0, among all; a run on its own is one."""

    index: int = 0
    count: int = 1

    @property
    def suffix(self) -> str:
        """Ending of this process's journal: processes may share a folder."""
        return "" if self.count == 1 else f".{self.index}-of-{self.count}"

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """Every `count`-th item, from `index` on."""
        return items[self.index :: self.count]

    def gather(self, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries of all processes in the order of the batches, on every process."""
        if self.count == 1:
            return list(entries)
        from jax.experimental.multihost_utils import process_allgather

        sent = np.frombuffer(json.dumps(list(entries)).encode("ascii"), np.uint8)
        try:
            sizes = np.asarray(process_allgather(np.array(len(sent), np.int32)))
            padded = np.pad(sent, (0, int(sizes.max()) - len(sent)))
            texts = np.asarray(process_allgather(padded))
        except (RuntimeError, ValueError) as error:  # a broken connection
            raise InputError(
                f"process {self.index} of {self.count} lost another one, whose output says why. "
                "Finished batches are kept: start all processes again with --resume."
            ) from error
        lists = [json.loads(bytes(text[:size])) for text, size in zip(texts, sizes, strict=True)]
        rounds = itertools.zip_longest(*lists)
        return [entry for one in rounds for entry in one if entry is not None]


def connect(coordinator: str | None, count: int, index: int) -> Processes:
    """Join the others at HOST:PORT of process 0 before anything is computed; None runs alone."""
    if coordinator is None:
        if (count, index) != (1, 0):
            raise ConfigError("several processes need --coordinator HOST:PORT, that of process 0.")
        return Processes()
    if not 0 <= index < count:
        raise ConfigError(f"--process-id must be from 0 to {count - 1}, got {index}.")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes=count,
            process_id=index,
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"process {index} could not join at {coordinator}: {error}") from error
    # JAX ends every process, past all Python, when one of them falls silent: say it beforehand.
    print(
        f"process {index} of {count}; all end within {HEARTBEAT_SECONDS} seconds if one is lost: "
        "then start all again with --resume, finished batches are kept",
        file=sys.stderr,
    )
    return Processes(index, count)
