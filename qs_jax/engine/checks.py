"""What is checked on the host before and after every program."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from qs_jax.config import ModelConfig
from qs_jax.errors import ConfigError, InternalError, NonFiniteError
from qs_jax.mechanisms.kv_maps import require_maps
from qs_jax.mechanisms.plan import Plan
from qs_jax.models import Params, abstract_params

_EXTRAS = ("kv_maps", "int8")  # they travel with the parameters; what needs them checks them


@functools.lru_cache(maxsize=64)
def _expected(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    return _signature(abstract_params(model))


def _signature(params: Params) -> dict[str, tuple[tuple[int, ...], str]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (np.shape(leaf), str(leaf.dtype))
        for path, leaf in leaves
    }


def check_params(params: Params, model: ModelConfig) -> None:
    """Parameters must be those of the model: same names, shapes and dtypes.

    Raises:
      ConfigError: They are another model's, or were changed.
    """
    given = _signature({name: part for name, part in params.items() if name not in _EXTRAS})
    expected = _expected(model)
    if given == expected:
        return
    name = next(n for n in (*expected, *given) if given.get(n) != expected.get(n))
    raise ConfigError(
        f"these parameters are not those of cfg.model: {name} is {_told(given.get(name))}, "
        f"expected {_told(expected.get(name))}. Use the pair that qs_jax.load returns."
    )


def check_maps(params: Params, plan: Plan, model: ModelConfig) -> None:
    """A policy that extrapolates needs the maps of its halting layers.

    Raises:
      ConfigError: They are absent, of other layers or another model, or for prompts only.
    """
    if plan.policy == "extrapolate":
        assert plan.halting is not None
        assert plan.halting.layers is not None
        require_maps(params, plan.halting.layers, model, prompts_only=plan.continuation)


def _told(entry: Any) -> str:
    return "absent" if entry is None else f"{entry[1]}{list(entry[0])}"


def check_overflow(overflow: Any) -> None:
    """A planned capacity must hold every token that computes.

    Raises:
      InternalError: It did not; capacities are worked out from the rows before they run.
    """
    if overflow:
        raise InternalError(
            "a planned capacity was too small for the tokens that compute: please report the "
            "configuration, and use capacity='dynamic'."
        )


def check_finite(finite_B: np.ndarray) -> None:
    """Results of every row must be finite.

    Args:
      finite_B: bool `[B]`.

    Raises:
      NonFiniteError: Some row is not.
    """
    if not finite_B.all():
        rows = np.flatnonzero(~finite_B).tolist()
        raise NonFiniteError(
            f"logits of row(s) {rows} are not finite: the weights hold NaN or infinity, or the "
            "dtype overflows. qs_jax.load checks weights; try dtype='float32'."
        )
