"""The layers' weights as decoding wants them: stacked, or each layer in arrays of its own.

XLA's CPU backend copies every layer's weights out of the stacked arrays inside a scan, which alone
doubles the time of a token.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import jax

from qs_jax.halves import bits_of, from_bits
from qs_jax.models import Params

# The one split kept, by the identity of the arrays it was made from; and in which layout.
_kept: dict[tuple[int, ...], tuple[bool, tuple[Any, ...]]] = {}


@functools.partial(jax.jit, static_argnames="transposed")
def _split(layers: Any, transposed: bool) -> tuple[Any, ...]:
    def of_layer(at: int) -> Any:
        layer = from_bits(jax.tree.map(lambda leaf: leaf[at], layers))
        return {name: _turned(part) for name, part in layer.items()} if transposed else layer

    count = jax.tree.leaves(layers)[0].shape[0]
    return tuple(of_layer(at) for at in range(count))


def _turned(part: dict[str, Any]) -> dict[str, Any]:
    if "kernel" not in part:
        return part
    others = {name: leaf for name, leaf in part.items() if name != "kernel"}
    return {**others, "transposed": part["kernel"].T}


def separate(params: Params, rows: int) -> tuple[Any, ...]:
    """The layers of stacked parameters, one tree each.

    Split once and kept as long as the arrays it was made from live, or until other parameters are
    split: it takes as many bytes as they do.

    Args:
      params: Stacked tree.
      rows: Rows that will be decoded together. One row reads kernels fastest where the weights
        of an output lie side by side: they come as "transposed" `[O, C]`, which `dense_product`
        takes. Several rows would be slower so.
    """
    leaves, transposed = jax.tree.leaves(params["layers"]), rows == 1
    key = tuple(id(leaf) for leaf in leaves)
    if key not in _kept:
        _kept.clear()
        for leaf in leaves:
            weakref.finalize(leaf, _kept.pop, key, None).atexit = False
    if key not in _kept or _kept[key][0] != transposed:
        _kept.pop(key, None)  # before the other layout takes its memory
        _kept[key] = transposed, _split(bits_of(params)["layers"], transposed)
    return _kept[key][1]


def chosen(setting: str) -> str:
    """What "auto" stands for on the default backend."""
    if setting != "auto":
        return setting
    return "separate" if jax.default_backend() == "cpu" else "stacked"
