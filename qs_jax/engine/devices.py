"""One program on several devices, a share of the rows on each (`jax.pmap`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qs_jax.errors import ConfigError
from qs_jax.models import Params


def local_devices(wanted: str | int) -> tuple[jax.Device, ...]:
    """Devices of this process: "all", or how many."""
    found = tuple(jax.local_devices())
    if wanted == "all":
        return found
    count = int(wanted) if str(wanted).isdecimal() and len(str(wanted)) < 10 else 0
    if not 1 <= count <= len(found):
        raise ConfigError(
            f"devices must be 'all' or between 1 and {len(found)}, the devices of kind "
            f"{found[0].device_kind} that this process has, got {wanted!r}."
        )
    return found[:count]


def replicate(params: Params, devices: Sequence[jax.Device]) -> Params:
    """Copy parameters to every device that does not have them yet."""
    sharding = NamedSharding(Mesh(np.array(devices), ("rows",)), PartitionSpec())
    return jax.device_put(params, sharding)


def run(
    function: Callable[..., dict[str, Any]],
    devices: Sequence[jax.Device],
    params: Params,
    rows: tuple[Any, ...],
    shared: tuple[Any, ...],
    static: dict[str, Any],
) -> dict[str, Any]:
    """Call `function(params, *rows, *shared, **static)` on shares of the rows.

    Rows that do not divide are filled up with the last one, whose copies are dropped again. Host
    arrays come back as one call with all rows would give them.
    """
    count, batch = len(devices), len(jax.tree.leaves(rows)[0])
    share = -(-batch // count)

    def split(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        filled = np.concatenate([leaf, np.repeat(leaf[-1:], share * count - batch, axis=0)])
        return filled.reshape(count, share, *leaf.shape[1:])

    program = _program(function, tuple(devices), len(rows), len(shared), tuple(static.items()))
    out = jax.device_get(program(replicate(params, devices), *jax.tree.map(split, rows), *shared))

    def join(path: Any, leaf: np.ndarray) -> np.ndarray:
        """Join on the rows' axis: the first, or the second of arrays over layers."""
        names = jax.tree_util.keystr(path, simple=True, separator=" ").split()
        axis = int("layers" in names or names[-1].endswith("_LBT"))
        leaf = np.moveaxis(leaf, 0, axis)
        joined = leaf.reshape(*leaf.shape[:axis], share * count, *leaf.shape[axis + 2 :])
        return joined[:, :batch] if axis else joined[:batch]

    return jax.tree_util.tree_map_with_path(join, out)


@functools.lru_cache(maxsize=64)
def _program(
    function: Callable[..., dict[str, Any]],
    devices: tuple[jax.Device, ...],
    rows: int,
    shared: int,
    static: tuple[tuple[str, Any], ...],
) -> Any:
    """A pmapped program is cached by the function it is made of: one for each set of settings."""
    in_axes = (None, *[0] * rows, *[None] * shared)
    return jax.pmap(functools.partial(function, **dict(static)), in_axes=in_axes, devices=devices)
