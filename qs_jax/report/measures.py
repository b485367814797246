"""Numbers of runs and of other commands' files: cost by component, decay of active tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qs_jax import accounting
from qs_jax.accounting import flops
from qs_jax.config import ModelConfig, QuickSilverConfig
from qs_jax.errors import InputError
from qs_jax.evaluation.perplexity import SAVED
from qs_jax.files import read_json
from qs_jax.mechanisms.kv_maps import MapSizes
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

_CONFIG = ("preset", "protocol", "data", "seq_len", "dtype", "engine")
_MEASURED = ("perplexity", "perplexity_interval", "windows", "simulated", *SAVED)
_COUNTED = ("layer_tokens", "kv_written", "halted", "fused", "bits_2", "bits_4", "bits_8")


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
    before = float(flops.stopped_keys_flops(record, model, qs, sizes).sum())
    flops_of["kv_only"] = before
    # Each mechanism is charged what it adds to those before it.
    steps = {"halting": "HK", "fusion": "HKF", "amq": "HKFQ"}
    for name, letters in steps.items():
        added = float(flops.added_flops(record, model, reduced(qs, letters), sizes).sum())
        flops_of[name], before = added - before, added
    flops_of["signals"] -= before
    return {name: flops_of[name] for name in COMPONENTS if flops_of.get(name)}


def counted_costs(counted: dict[str, Any], model: ModelConfig) -> dict[str, float]:
    """FLOPs of each component from a tally, in which all costs of mechanisms are "signals"."""

    def total(name: str) -> float:
        return float(sum(counted[phase][name] for phase in ("prefill", "decode")))

    return {
        **{name: total(name) for name in ("attention_projections", "attention_keys", "mlp")},
        "head": total("readouts") * flops.head_flops(model),
        "signals": total("added_flops"),
    }


def read_results(path: Path) -> dict[str, Any]:
    """What a report shows of a results file of `python -m qs_jax evaluate`.

    Raises:
      InputError: It is no such file.
    """
    return _read(path, _results, "a results file of `python -m qs_jax evaluate`")


def read_front(path: Path) -> dict[str, Any]:
    """The candidates and the budget of a `FILE.search.json` of `python -m qs_jax calibrate`.

    Raises:
      InputError: It is no such file.
    """
    return _read(path, _front, "a search of `python -m qs_jax calibrate` (FILE.search.json)")


def _read(path: Path, parse: Callable[[dict[str, Any]], dict[str, Any]], kind: str) -> Any:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not an object in JSON.")
    try:
        return {"file": path.name} | parse(content)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{path} is not {kind}: {reason}.") from error


def _results(content: dict[str, Any]) -> dict[str, Any]:
    config, counts = content["config"], content["counts"]
    model = ModelConfig.from_dict(content["model"]["config"])
    both = [counts["prefill"], counts["decode"]]
    # Under "continuation" the mechanisms act on the prompt.
    parts = both[:1] if config["protocol"] == "continuation" else both
    layers = {
        name: [sum(each) for each in zip(*(part["per_layer"][name] for part in parts), strict=True)]
        for name in _COUNTED
    }
    return {
        **{name: config[name] for name in _CONFIG},
        **{name: content[name] for name in _MEASURED},
        "idle": content.get("idle"),  # files of earlier versions do not say
        "tokens": sum(part["tokens"] for part in parts),
        "per_layer": layers,
        "decay": fit_decay(layers["layer_tokens"]),
        "costs": {name: flops for name, flops in counted_costs(counts, model).items() if flops},
        "dense_flops": float(sum(part["exact_flops_dense"] for part in both)),
    }


def _front(content: dict[str, Any]) -> dict[str, Any]:
    provenance = content["preset"]["provenance"]
    saved = f"{provenance['objective']}_saved"

    def points(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: row[name] for name in ("family", "saving", "ppl_increase")} for row in rows]

    measured = [row for row in content["verified"] if row.get(saved) is not None]
    return {
        "points": points(content["points"]),
        "front": points(content["front"]),
        "verified": points([{"saving": row[saved]} | row for row in measured]),
        "objective": provenance["objective"],
        "budget": provenance["max_ppl_increase"],
    }
