"""The layers' weights as decoding wants them: stacked, or each layer in arrays of its own.

XLA's CPU backend copies every layer's weights out of the stacked arrays inside a scan, which alone
doubles the time of a token.
"""

from __future__ import annotations

import weakref
from typing import Any

import jax

from qs_jax.models import Params

# The one split kept, by the identity of the arrays it was made from.
_kept: dict[tuple[int, ...], tuple[Any, ...]] = {}


@jax.jit
def _split(layers: Any) -> tuple[Any, ...]:
    count = jax.tree.leaves(layers)[0].shape[0]
    return tuple(jax.tree.map(lambda leaf, at=at: leaf[at], layers) for at in range(count))


def separate(params: Params) -> tuple[Any, ...]:
    """The layers of stacked parameters, one tree each.

    Split once and kept as long as the arrays it was made from live, or until other parameters are
    split: it takes as many bytes as they do.
    """
    leaves = jax.tree.leaves(params["layers"])
    key = tuple(id(leaf) for leaf in leaves)
    if key not in _kept:
        _kept.clear()
        _kept[key] = _split(params["layers"])
        for leaf in leaves:
            weakref.finalize(leaf, _kept.pop, key, None).atexit = False
    return _kept[key]


def chosen(setting: str) -> str:
    """What "auto" stands for on the default backend."""
    if setting != "auto":
        return setting
    return "separate" if jax.default_backend() == "cpu" else "stacked"
