"""One program on several devices: rows split by `jax.pmap`, or rows and parameters over a mesh.

A mesh has two axes. Rows are split over "data"; the parameters are cut over "model", which is
tensor-parallel. The programs are those of a single device: `jax.jit` partitions them by where
their arrays are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qs_jax.errors import ConfigError
from qs_jax.models import Params

# What `devices=` takes: those that rows are split over, or a mesh.
Devices: TypeAlias = Sequence[jax.Device] | Mesh
AXES = ("data", "model")

# --- which devices ------------------------------------------------------------------------------


def make_mesh(
    data: int | None = None, model: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Arrange devices for `devices=` of `load`, `score`, `generate`, `stream` and the evaluations.

    Args:
      data: Groups of devices that rows are split over; None is as many as there are devices for.
      model: Devices of a group, over which the parameters are cut.
      devices: Which to take, the first `data * model` of them; None is those of this process.

    Returns:
      A mesh with the axes "data" and "model".

    Raises:
      ConfigError: There are fewer devices than that, or, without `data`, they do not divide.
    """
    found = list(jax.local_devices() if devices is None else devices)
    if model >= 1 and data is None:
        if not found or len(found) % model:
            raise ConfigError(f"{len(found)} device(s) make no groups of model={model}: give data.")
        data = len(found) // model
    if data is None or data < 1 or model < 1:
        raise ConfigError(f"data and model must be at least 1, got {data} and {model}.")
    if data * model > len(found):
        raise ConfigError(
            f"a mesh of {data} x {model} takes {data * model} devices and there are {len(found)}: "
            "give fewer. On CPU, jax_num_cpu_devices makes several."
        )
    return Mesh(np.asarray(found[: data * model]).reshape(data, model), AXES)


def as_mesh(devices: Devices) -> Mesh:
    """The mesh itself, checked, or one that splits rows over a sequence of devices."""
    if not isinstance(devices, Mesh):
        return make_mesh(len(devices), devices=devices)
    if devices.axis_names != AXES or devices.is_multi_process:
        raise ConfigError(
            f"devices must be a mesh of this process's devices with the axes {AXES}, got "
            f"{dict(devices.shape)}: qs_jax.make_mesh makes one."
        )
    return Mesh(devices.devices, AXES)  # of axes that jit partitions by itself


def local_devices(wanted: str | int) -> Devices | None:
    """Devices of this process: how many, "all", or "2x4" for a mesh; None is a single one."""
    found, sizes = tuple(jax.local_devices()), str(wanted).split("x")
    if wanted == "all":
        sizes = [str(len(found))]
    counts = [int(size) if size.isdecimal() and len(size) < 10 else 0 for size in sizes]
    if len(counts) > 2 or not 1 <= np.prod(counts, dtype=object) <= len(found):
        raise ConfigError(
            f"devices must be 'all' or between 1 and {len(found)}, the devices of kind "
            f"{found[0].device_kind} that this process has, or 2x2 for a mesh of as many; got "
            f"{wanted!r}."
        )
    if len(counts) == 2:
        return make_mesh(counts[0], counts[1])
    return found[: counts[0]] if counts[0] > 1 else None


# --- where parameters and rows are --------------------------------------------------------------


def shard(params: Params, mesh: Mesh) -> Params:
    """Cut parameters over the axis "model" of a mesh, with copies along "data".

    Projections into heads and neurons are cut by columns, those back by rows, tables by tokens.
    Axes that do not divide evenly, and everything else, are copied. Arrays that are in place stay.

    Args:
      params: From `qs_jax.load`.
      mesh: From `qs_jax.make_mesh`.

    Raises:
      ConfigError: The mesh has other axes.
    """
    mesh = as_mesh(mesh)

    def put(path: Any, leaf: Any) -> jax.Array:
        wanted = sharding_of(path, np.shape(leaf), mesh)
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(wanted, leaf.ndim):
            return leaf
        return jax.device_put(leaf, wanted)

    return jax.tree_util.tree_map_with_path(put, params)


def sharding_of(path: Any, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where `shard` puts the leaf at a path of the parameter tree."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    axis = None
    if names[0] == "layers" and names[1] in ("qkv", "gate_up", "up"):  # biases, too
        axis = len(shape) - 1
    elif names[0] == "layers" and names[1] in ("out", "down") and names[2] == "kernel":
        axis = len(shape) - 2
    elif names in (["embed", "tokens"], ["head", "tokens"]):
        axis = 0
    spec: list[str | None] = [None] * len(shape)
    if axis is not None and mesh.shape["model"] > 1 and shape[axis] % mesh.shape["model"] == 0:
        spec[axis] = "model"
    return NamedSharding(mesh, PartitionSpec(*spec))


def replicate(params: Params, devices: Sequence[jax.Device]) -> Params:
    """Copy parameters to every device that does not have them yet."""
    sharding = NamedSharding(Mesh(np.array(devices), ("rows",)), PartitionSpec())
    return jax.device_put(params, sharding)


def place(params: Params, devices: Devices | None) -> Params:
    """Parameters where calls with these `devices` read them: `shard` or `replicate`."""
    if devices is None:
        return params
    return shard(params, devices) if isinstance(devices, Mesh) else replicate(params, devices)


def fill(rows: Any, count: int) -> Any:
    """Arrays of rows on the host, filled up to a multiple of `count` with copies of the last."""

    def filled(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        return np.concatenate([leaf, np.repeat(leaf[-1:], -len(leaf) % count, axis=0)])

    return jax.tree.map(filled, rows)


def put_rows(rows: Any, mesh: Mesh | None) -> Any:
    """Arrays of rows split over a mesh, filled up where they do not divide; None leaves them."""
    if mesh is None:
        return rows
    spec = NamedSharding(mesh, PartitionSpec("data"))
    return jax.device_put(fill(rows, mesh.shape["data"]), spec)


def put_beside(tree: Any, params: Params) -> Any:
    """Arrays on the devices of the parameters, where they are on others: a copy on each."""
    wanted = jax.tree.leaves(params)[0].sharding
    if isinstance(wanted, NamedSharding):
        wanted = NamedSharding(wanted.mesh, PartitionSpec())

    def put(leaf: jax.Array) -> jax.Array:
        same = leaf.sharding.device_set == wanted.device_set
        return leaf if same else jax.device_put(leaf, wanted)

    return jax.tree.map(put, tree)


def first_rows(tree: Any, batch: int) -> Any:
    """Results without the rows that were filled up."""

    def cut(path: Any, leaf: Any) -> Any:
        axis = _row_axis(path)
        return leaf if leaf.shape[axis] == batch else leaf[(slice(None),) * axis + (slice(batch),)]

    return jax.tree_util.tree_map_with_path(cut, tree)


def end_copies(text: Any, batch: int) -> Any:
    """What rows have produced; rows that were filled up have ended and take part in no choice."""
    if len(text.done_B) == batch:
        return text
    return text.replace(done_B=text.done_B | (np.arange(len(text.done_B)) >= batch))


def _row_axis(path: Any) -> int:
    """The rows' axis of a result: the first, or the second of arrays over layers."""
    names = jax.tree_util.keystr(path, simple=True, separator=" ").split()
    return int("layers" in names or names[-1].endswith("_LBT"))


# --- pmap ---------------------------------------------------------------------------------------


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

    def split(leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(count, -1, *leaf.shape[1:])

    shares = jax.tree.map(split, fill(rows, count))
    program = _program(function, tuple(devices), len(rows), len(shared), tuple(static.items()))
    out = jax.device_get(program(replicate(params, devices), *shares, *shared))

    def join(path: Any, leaf: np.ndarray) -> np.ndarray:
        axis = _row_axis(path)
        leaf = np.moveaxis(leaf, 0, axis)
        return leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])

    return first_rows(jax.tree_util.tree_map_with_path(join, out), batch)


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
