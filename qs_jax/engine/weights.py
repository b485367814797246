"""Parameters as programs take them: checked, with the codes and maps that mechanisms read."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qs_jax.config import ModelConfig
from qs_jax.engine.devices import shard
from qs_jax.errors import ConfigError, NonFiniteError
from qs_jax.mechanisms import Mechanisms
from qs_jax.mechanisms.int8 import quantize_weights
from qs_jax.mechanisms.kv_maps import require_maps, select
from qs_jax.mechanisms.last import LastMade
from qs_jax.mechanisms.light import bind
from qs_jax.models import Params, abstract_params
from qs_jax.models.cpu import stored_params
from qs_jax.models.quantized import is_quantized

_EXTRAS = ("kv_maps", "int8")  # they travel with the parameters; their readers check them


class Weights(NamedTuple):
    """Arrays of one layer or of all: the block's, int8 codes and maps (None where not read)."""

    params: Any
    int8: Any
    maps: Any


def layer_weights(params: Params) -> Weights:
    """Weights of all layers, to be scanned over."""
    maps = params["kv_maps"].maps_LXFO if "kv_maps" in params else None
    return Weights(params["layers"], params.get("int8"), maps)


def prepare_params(
    params: Params, model: ModelConfig, mech: Mechanisms, mesh: Mesh | None = None
) -> Params:
    """Checked parameters, as programs take them, with the codes and maps that mechanisms read."""
    check_params(params, model)
    params = params if mesh is None else shard(params, mesh)
    prepared = {name: part for name, part in params.items() if name not in _EXTRAS}
    if mech.amq is not None and mech.amq.multiplies_int8:
        prepared["int8"] = quantize_weights(params)["int8"]
    if mech.kv_skip.policy == "extrapolate":
        assert mech.halting is not None
        layers = mech.halting.layers or ()
        needed = {"light_from": mech.halting.light_from, "ranks": mech.halting.leaves_whole}
        require_maps(params, layers, model, **needed, prompts_only=mech.continuation)
        maps = params["kv_maps"]
        prepared["kv_maps"] = maps if maps.layers == layers else select(maps, layers)
        if mech.halting.light_from is not None:
            read = jax.tree.leaves((params["layers"], maps.light, maps.neurons))
            prepared["light"] = _last.get(read, lambda: bind(params, maps, model))
    return stored_params(prepared)


_last = LastMade()


@functools.lru_cache(maxsize=64)
def _expected(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    return _signature(abstract_params(model))


def _signature(params: Params) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (np.shape(leaf), str(leaf.dtype))
        for path, leaf in leaves
    }


def check_params(params: Params, model: ModelConfig, *, floats: bool = False) -> None:
    """Raise `ConfigError` unless parameters have the model's names, shapes and dtypes.

    Codes count as the kernels that they stand for, unless `floats` are asked for.
    """

    def as_float(leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        if floats:
            raise ConfigError("maps are fitted on floats: load the checkpoint without `weights`.")
        return jax.ShapeDtypeStruct(leaf.shape, model.dtype)

    own = {name: part for name, part in params.items() if name not in _EXTRAS}
    given = _signature(jax.tree.map(as_float, own, is_leaf=is_quantized))
    expected = _expected(model)
    if given == expected:
        return
    name = next(n for n in (*expected, *given) if given.get(n) != expected.get(n))

    def describe(entry: tuple[tuple[int, ...], str] | None) -> str:
        return "absent" if entry is None else f"{entry[1]}{list(entry[0])}"

    raise ConfigError(
        f"these parameters are not those of cfg.model: {name} is {describe(given.get(name))}, "
        f"expected {describe(expected.get(name))}. Use the pair that qs_jax.load returns."
    )


def check_finite(finite_B: np.ndarray) -> None:
    """Raise `NonFiniteError` unless the results of every row are finite."""
    if not finite_B.all():
        rows = np.flatnonzero(~finite_B).tolist()
        raise NonFiniteError(
            f"logits of row(s) {rows} are not finite: the weights hold NaN or infinity, or the "
            "dtype overflows. qs_jax.load checks weights; try dtype='float32'."
        )
