"""Numbers of a run: cost by component, and the decay of active tokens."""

from __future__ import annotations

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
from qs_jax.report.trace import reduced

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


def fit_decay(active_L: Sequence[Any] | np.ndarray) -> dict[str, Any]:
    """Fit N(l) = start * exp(-rate * l) to the active tokens of layers l = 1 to L.

    "r_squared" is None where every layer has as many tokens.

    Source: QuickSilver J and K, "Active Token Decay".
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    count_L = np.asarray(active_L, np.float64)
    layer_L = np.arange(1, len(count_L) + 1)
    spread = float(((count_L - count_L.mean()) ** 2).sum())
    if spread == 0:
        return {"start": float(count_L[0]), "rate": 0.0, "r_squared": None}
    guess = (count_L.max(), np.log(count_L[0] / max(count_L[-1], 0.5)) / len(count_L))
    with warnings.catch_warnings():  # two layers give no covariance, which is not read
        warnings.simplefilter("ignore", OptimizeWarning)
        (start, rate), _ = curve_fit(decayed, layer_L, count_L, p0=guess, maxfev=10_000)
    missed = float(((count_L - decayed(layer_L, start, rate)) ** 2).sum())
    return {"start": float(start), "rate": float(rate), "r_squared": 1 - missed / spread}


def decayed(layer_L: np.ndarray, start: float, rate: float) -> np.ndarray:
    """Active tokens of the fitted exponential at each layer."""
    return start * np.exp(-rate * layer_L)


def active_tokens(record: Record) -> np.ndarray:
    """Tokens that ran each layer, `[L]`, of those the mechanisms may act on."""
    return (record.active & record.subject).sum((1, 2))


def costs(
    record: Record, model: ModelConfig, qs: QuickSilverConfig, sizes: MapSizes | None = None
) -> dict[str, float]:
    """FLOPs of each component; they add up to the exact count of `qs_jax.accounting`."""
    flops_of = counted_costs(accounting.tally(record, model, qs, sizes), model)
    if qs.kv_skip is None or qs.kv_skip.policy != "extrapolate":
        sizes = None
    # Each mechanism is charged what it adds to those before it.
    before = 0.0
    steps = {"kv_only": "", "halting": "HK", "fusion": "HKF", "amq": "HKFQ"}
    for name, letters in steps.items():
        added = float(flops.added_flops(record, model, reduced(qs, letters), sizes).sum())
        flops_of[name], before = added - before, added
    flops_of["signals"] -= before
    return {name: flops_of[name] for name in COMPONENTS if flops_of.get(name)}


def counted_costs(counted: dict[str, Any], model: ModelConfig) -> dict[str, float]:
    """FLOPs of each component from a tally, in which all costs of mechanisms are "signals"."""

    def total(name: str) -> float:
        return float(sum(counted[phase][name] for phase in ("prefill", "decode")))

    mlp = 2 * model.hidden_size * model.mlp_size * family_of(model).mlp_products
    return {
        "attention_projections": total("layer_tokens") * (flops.linear_flops(model) - mlp),
        "attention_keys": total("visible_keys") * flops.key_flops(model),
        "mlp": total("layer_tokens") * mlp,
        "head": total("readouts") * flops.head_flops(model),
        "signals": total("added_flops"),
    }
