"""What a caller may decide about single tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, no_type_check

import numpy as np

from qs_jax.config import Config
from qs_jax.errors import InputError
from qs_jax.mechanisms.decide import Overrides
from qs_jax.mechanisms.plan import NEVER


@no_type_check
@dataclasses.dataclass(frozen=True)
class TokenOverrides:
    """Overrides of single tokens; arrays over `[B, T]`, aligned with right-padded rows.

    Attributes:
      full_processing: bool: never halts, fuses, loses its keys or goes below 8 bits.
      forced_halt: int: layer at which the token halts at the latest; 0 for none.
      retain_kv: bool: its keys and values are always written.
    """

    full_processing: Any = None
    forced_halt: Any = None
    retain_kv: Any = None


def _regular(name: str, given: Any) -> np.ndarray:
    try:
        return np.asarray(given)
    except ValueError as error:
        raise InputError(f"overrides.{name} is not a regular array: {error}") from error


@no_type_check
def arrays_of(
    overrides: TokenOverrides | None, shape: tuple[int, int], width: int, cfg: Config
) -> Overrides | None:
    """Arrays of a padded batch, `shape`, whose longest row has `width` tokens.

    Raises:
      InputError: An array has other rows or columns than the batch, the wrong kind of numbers, or
        no effect under this configuration.
    """
    if overrides is None:
        return None
    if not isinstance(overrides, TokenOverrides):  # callers without a type checker
        raise InputError(f"overrides must be a qs_jax.TokenOverrides, got {type(overrides)}.")
    _refuse_no_effect(overrides, cfg)

    def fill(name: str, empty: Any, dtype: Any) -> np.ndarray:
        out = np.full(shape, empty, dtype)
        given = getattr(overrides, name)
        if given is None:
            return out
        array = np.atleast_2d(_regular(name, given))
        fits = array.shape == (shape[0], width)
        if not fits or not (array.dtype == bool or np.issubdtype(array.dtype, np.integer)):
            raise InputError(
                f"overrides.{name} has shape {array.shape} and dtype {array.dtype}; expected one "
                f"integer or truth value for each token, ({shape[0]}, {width})."
            )
        out[:, : array.shape[1]] = array
        return out

    forced = fill("forced_halt", 0, np.int32)
    return Overrides(
        full_BT=fill("full_processing", False, bool),
        forced_layer_BT=np.where(forced > 0, forced, NEVER).astype(np.int32),
        retain_BT=fill("retain_kv", False, bool),
    )


def _refuse_no_effect(overrides: TokenOverrides, cfg: Config) -> None:
    qs, deepest = cfg.quicksilver, cfg.model.num_layers - 1
    if qs is None or qs.is_off:
        raise InputError("overrides have no effect: every mechanism is off.")
    policy = qs.kv_skip.policy if qs.kv_skip is not None else None
    if overrides.forced_halt is not None:
        if qs.halting is None:
            raise InputError("overrides.forced_halt has no effect: halting is off.")
        layers = np.unique(_regular("forced_halt", overrides.forced_halt))
        if not np.issubdtype(layers.dtype, np.integer):
            raise InputError("overrides.forced_halt must hold layer numbers, 0 for none.")
        mapped = qs.halting.layers or ()
        if policy == "extrapolate" and not set(layers[layers > 0].tolist()) <= set(mapped):
            raise InputError(
                f"overrides.forced_halt holds layers {layers.tolist()}, but there are maps for "
                f"{mapped} only."
            )
        largest = int(layers.max(initial=0))
        if largest > deepest:
            raise InputError(
                f"overrides.forced_halt holds layer {largest}: layers 1 to {deepest} leave any "
                "to save."
            )
    if overrides.retain_kv is not None and policy not in ("skip", "attended"):
        raise InputError("overrides.retain_kv has no effect: no keys are skipped.")
