"""Numbers of a run: quality, savings, cost by component, and the decay of active tokens."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from qs_jax import accounting
from qs_jax.accounting import flops
from qs_jax.config import ModelConfig, QuickSilverConfig
from qs_jax.mechanisms.kv_maps import MapSizes
from qs_jax.models import family_of
from qs_jax.record import Record

# Components in the order they are drawn, and what they are.
COMPONENTS = {
    "attention_projections": "attention projections",
    "attention_keys": "attention over keys",
    "mlp": "MLP",
    "head": "readout (head)",
    "kv_only": "keys of stopped tokens",
    "halting": "halting signals",
    "fusion": "fusion",
    "amq": "quantization",
    "signals": "signals and tests",
}


@dataclasses.dataclass(frozen=True)
class Decay:
    """N(l) = start * exp(-rate * l), fitted to the active tokens of layers l = 1 to L.

    Attributes:
      start: Tokens.
      rate: Per layer; the paper reports 0.05 to 0.1 (J, K).
      r_squared: Share of the variance explained; None where every layer has as many tokens.
    """

    start: float
    rate: float
    r_squared: float | None


def fit_decay(active_L: Sequence[Any] | np.ndarray) -> Decay:
    """Least-squares fit of the exponential, by `scipy.optimize.curve_fit`.

    Args:
      active_L: Active tokens of each layer.

    Source: QuickSilver J and K, "Active Token Decay".
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    count_L = np.asarray(active_L, np.float64)
    layer_L = np.arange(1, len(count_L) + 1)
    spread = float(((count_L - count_L.mean()) ** 2).sum())
    if spread == 0:
        return Decay(float(count_L[0]), 0.0, None)

    def curve(layer: np.ndarray, start: float, rate: float) -> np.ndarray:
        return start * np.exp(-rate * layer)

    guess = (count_L.max(), np.log(count_L[0] / max(count_L[-1], 0.5)) / len(count_L))
    with warnings.catch_warnings():  # two layers give no covariance, which is not read
        warnings.simplefilter("ignore", OptimizeWarning)
        (start, rate), _ = curve_fit(curve, layer_L, count_L, p0=guess, maxfev=10_000)
    missed = float(((count_L - curve(layer_L, start, rate)) ** 2).sum())
    return Decay(float(start), float(rate), 1 - missed / spread)


def active_tokens(record: Record) -> np.ndarray:
    """Tokens that ran each layer, `[L]`, of those the mechanisms may look at."""
    return (record.active & record.subject).sum((1, 2))


def costs(
    record: Record, model: ModelConfig, qs: QuickSilverConfig, sizes: MapSizes | None = None
) -> dict[str, float]:
    """FLOPs of each component; they add up to the exact count of `qs_jax.accounting`.

    Args:
      record: Of the run.
      model: Sizes.
      qs: Mechanisms that ran.
      sizes: Of the extrapolation maps, where the policy reads them.
    """
    counted = accounting.tally(record, model, qs, sizes)
    policy = qs.kv_skip.policy if qs.kv_skip is not None else None
    sizes = sizes if policy == "extrapolate" else None
    found = counted_costs(counted, model)
    # Each mechanism is charged what it adds to those before it.
    steps = {"kv_only": {"halting": None, "kv_skip": None, "fusion": None, "amq": None}}
    steps["halting"] = {"fusion": None, "amq": None}
    steps["fusion"], steps["amq"] = {"amq": None}, {}
    before = 0.0
    for name, without in steps.items():
        part = dataclasses.replace(qs, **without)
        added = float(flops.added_flops(record, model, part, sizes).sum())
        found[name], before = added - before, added
    found["signals"] -= before
    return {name: found[name] for name in COMPONENTS if found.get(name)}


def counted_costs(counted: dict[str, Any], model: ModelConfig) -> dict[str, float]:
    """The same from a tally, which does not tell the mechanisms' own costs apart ("signals")."""
    both = [counted["prefill"], counted["decode"]]

    def total(name: str) -> float:
        return float(sum(part[name] for part in both))

    mlp = 2 * model.hidden_size * model.mlp_size * family_of(model).mlp_products
    return {
        "attention_projections": total("layer_tokens") * (flops.linear_flops(model) - mlp),
        "attention_keys": total("visible_keys") * flops.key_flops(model),
        "mlp": total("layer_tokens") * mlp,
        "head": total("readouts") * flops.head_flops(model),
        "signals": total("added_flops"),
    }
