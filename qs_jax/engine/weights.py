"""The layers' weights as decoding wants them: stacked, or each layer in arrays of its own.

XLA's CPU backend copies every layer's weights out of the stacked arrays inside a scan, which alone
doubles the time of a token. A single row is multiplied with them where they lie (`InPlace`).
"""

from __future__ import annotations

import weakref
from typing import Any

import flax.struct
import jax

from qs_jax.halves import bits_of, from_bits
from qs_jax.models import Params
from qs_jax.models.one_vector import KernelAt

# The one split kept, by the identity of the arrays it was made from.
_kept: dict[tuple[int, ...], tuple[Any, ...]] = {}


@flax.struct.dataclass
class InPlace:
    """Stacked layers whose kernels a single vector is multiplied with as they lie."""

    stacked: Any


def of_layer(layers: Any, index: Any) -> Any:
    """One layer's parameters out of stacked ones, or of those `InPlace`."""
    if not isinstance(layers, InPlace):
        return from_bits(jax.tree.map(lambda leaf: leaf[index], layers))

    def of(name: str, leaf: Any) -> Any:
        return KernelAt(leaf, index) if name == "kernel" else from_bits(leaf[index])

    parts = layers.stacked.items()
    return {part: {name: of(name, x) for name, x in leaves.items()} for part, leaves in parts}


@jax.jit
def _split(layers: Any) -> tuple[Any, ...]:
    count = jax.tree.leaves(layers)[0].shape[0]
    return tuple(of_layer(layers, index) for index in range(count))


def separate(params: Params) -> tuple[Any, ...]:
    """The layers of stacked parameters, one tree each.

    Split once and kept as long as the arrays it was made from live, or until other parameters are
    split: it takes as many bytes as they do.
    """
    leaves = jax.tree.leaves(params["layers"])
    key = tuple(id(leaf) for leaf in leaves)
    if key not in _kept:
        _kept.clear()
        for leaf in leaves:
            weakref.finalize(leaf, _kept.pop, key, None).atexit = False
        _kept[key] = _split(bits_of(params)["layers"])
    return _kept[key]


def as_decoded(params: Params, setting: str, rows: int) -> Any:
    """The layers as a decode wants them: stacked, the same `InPlace`, or separate.

    Args:
      params: Stacked tree.
      setting: `Config.decode_weights`.
      rows: Rows that are decoded together.
    """
    if chosen(setting, rows) == "separate":
        return separate(params)
    layers = bits_of(params)["layers"]
    return InPlace(layers) if rows == 1 and jax.default_backend() == "cpu" else layers


def chosen(setting: str, rows: int) -> str:
    """What "auto" stands for on the default backend."""
    if setting != "auto":
        return setting
    return "separate" if rows > 1 and jax.default_backend() == "cpu" else "stacked"
