"""What `benchmarks.ablation` scores: each mechanism alone, added up, and along its threshold.

H is halting, K is KV skipping, F is fusion, Q is adaptive quantization (paper, appendix P).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import mechanism_rows
from qs_jax import presets
from qs_jax.config import AMQConfig, FusionConfig, ModelConfig, QuickSilverConfig

LETTERS = {"H": "halting", "K": "kv_skip", "F": "fusion", "Q": "amq"}
PAPER = "paper-bits-vocab"
HALT_PERCENTS = (5, 15, 25, 50)
FUSE_PERCENTS = (1, 5, 15, 25)
QUOTA_DEPTHS = (0.5, 2 / 3, 0.8)
QUOTA_SHARES = (0.5, 1.0)
# Of the paper's Tables 3 and 10, by name; then two around them.
BITS: dict[str, tuple[float, float]] = {
    "2/4/8 bits (1.0, 2.3)": (1.0, 2.3),
    "4/8 bits (2.3)": (float("-inf"), 2.3),
    "2/4 bits (1.2)": (1.2, float("inf")),
    "2/4/8 bits (0.5, 1.5)": (0.5, 1.5),
    "2/4/8 bits (2.0, 3.5)": (2.0, 3.5),
}
# Depths of 30 at which the percentile settings halt, as in `benchmarks.mechanisms`.
_PERCENTILE_LAYERS = (12, 18, 24)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
      name: "H", "H+K", ..., or the point of a sweep.
      kind: "isolated", "cumulative" or "sweep".
      settings: Where the thresholds come from: "paper", "percentile", a preset's name or its file.
      quicksilver: What runs.
      sweep: Which sweep the row is a point of.
      values: The swept settings, by name.
      whole: All mechanisms of its settings.
    """

    name: str
    kind: str
    settings: str
    quicksilver: QuickSilverConfig
    sweep: str | None = None
    values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    whole: bool = False

    @property
    def source(self) -> str:
        """Its settings without a folder."""
        return Path(self.settings).name

    @property
    def mechanisms(self) -> str:
        """Letters of what runs."""
        qs = self.quicksilver
        on = {letter for letter, field in LETTERS.items() if getattr(qs, field) is not None}
        if qs.halting is not None and not qs.halting.freeze:
            on.discard("H")  # flags only
        return "".join(letter for letter in LETTERS if letter in on)


def digest(qs: QuickSilverConfig, *where: Any) -> str:
    """Names a measurement: what runs, where its numbers come from left out, and on what."""
    fields = {name: value for name, value in qs.to_dict().items() if name != "provenance"}
    return hashlib.sha256(json.dumps([fields, *where]).encode()).hexdigest()[:16]


def threshold(fitted: Mapping[str, Any], name: str, percent: int) -> list[float]:
    """A percentile of a signal at every layer.

    Args:
      fitted: `qs_jax.calibration.observe.Observed.to_dict()`.
      name: "drift", "entropy" or "distance".
      percent: One of its "percents".
    """
    column = list(fitted["percents"]).index(percent)
    return [row[column] for row in fitted[name]]


def by_percentile(
    model: ModelConfig, fitted: Mapping[str, Any], percent: int = 25
) -> QuickSilverConfig:
    """The paper's settings with thresholds by its rules on this model.

    A percentile of drift and of entropy at three halting layers (25 in B.2), and the 15th of the
    distances of neighbours (D.3).
    """
    depth, deepest = model.num_layers, model.num_layers - 1
    layers = sorted({min(max(round(at / 30 * depth), 1), deepest) for at in _PERCENTILE_LAYERS})
    drift, entropy = (threshold(fitted, name, percent) for name in ("drift", "entropy"))
    return mechanism_rows.by_percentiles(
        model,
        {
            "layers": layers,
            "tau_drift": [drift[layer - 1] for layer in layers],
            "tau_halt": [entropy[layer - 1] for layer in layers],
            "tau_fuse": fitted["tau_fuse"],
        },
    )


def full(name: str, model: ModelConfig, fitted: Mapping[str, Any]) -> QuickSilverConfig:
    """All mechanisms of some settings.

    Args:
      name: "paper", "percentile", or a preset's name or file.
      model: Architecture.
      fitted: As `threshold`.

    Raises:
      ConfigError: There is no such preset, or it does not fit.
    """
    if name == "percentile":
        return by_percentile(model, fitted)
    return presets.by_name(PAPER if name == "paper" else name, model)


def decomposed(settings: str, whole: QuickSilverConfig) -> Iterator[Case]:
    """Each mechanism alone, then added one after the other (paper Table 11).

    Keys that are computed for every token, as `propagate` and `extrapolate` do, are nothing without
    halting: K alone is left out there.
    """
    there = [letter for letter, field in LETTERS.items() if getattr(whole, field) is not None]
    computes = whole.kv_skip is not None and whole.kv_skip.policy in ("propagate", "extrapolate")
    for letter in there:
        if letter != "K" or not computes:
            yield Case(letter, "isolated", settings, mechanism_rows.only(whole, letter))
    for count in range(1, len(there) + 1):
        letters = "+".join(there[:count])
        qs = mechanism_rows.only(whole, letters)
        yield Case(letters, "cumulative", settings, qs, whole=count == len(there))


def sweeps(model: ModelConfig, fitted: Mapping[str, Any]) -> Iterator[Case]:
    """Points along one threshold; all of a sweep but 8 bits for all share one program."""
    for percent in HALT_PERCENTS:
        qs = mechanism_rows.only(by_percentile(model, fitted, percent), "HK")
        name = f"drift and entropy under percentile {percent}"
        yield Case(name, "sweep", "percentile", qs, "halting", {"percentile": percent})
    paper = presets.NAMES[PAPER](model)
    assert paper.fusion is not None
    assert paper.amq is not None
    for percent in FUSE_PERCENTS:
        qs = QuickSilverConfig(fusion=_fusion(paper.fusion, fitted, percent))
        name = f"distance under percentile {percent}"
        yield Case(name, "sweep", "percentile", qs, "fusion", {"percentile": percent})
    yield from _quotas(model)
    same = {"layer": paper.amq.layer, "group": paper.amq.group}
    eight = QuickSilverConfig(amq=AMQConfig.uniform(8, **same))
    yield Case("8 bits", "sweep", "paper", eight, "bits")
    for name, (low, high) in BITS.items():
        amq = dataclasses.replace(paper.amq, tau_low=low, tau_high=high)
        values = {"tau_low": low, "tau_high": high}
        yield Case(name, "sweep", "paper", QuickSilverConfig(amq=amq), "bits", values)


def _fusion(base: FusionConfig, fitted: Mapping[str, Any], percent: int) -> FusionConfig:
    near = enumerate(threshold(fitted, "distance", percent), start=1)
    taus = tuple(tau if layer >= base.first_layer else 0.0 for layer, tau in near)
    return dataclasses.replace(base, tau_fuse=taus)


def _quotas(model: ModelConfig) -> Iterator[Case]:
    deepest = model.num_layers - 1
    layers = {min(max(round(depth * model.num_layers), 1), deepest) for depth in QUOTA_DEPTHS}
    for layer in sorted(layers):
        for share in QUOTA_SHARES:
            qs = mechanism_rows.quota(layer, share, "skip")
            values = {"layer": layer, "share": share}
            name = f"{share:.0%} at layer {layer}"
            yield Case(name, "sweep", "quota", qs, "quota", values)
