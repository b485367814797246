"""The rows of `python -m benchmarks.mechanisms`: which configuration, under which protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qs_jax
from examples.key_norm import key_norm
from qs_jax import presets
from qs_jax.config import (
    AMQConfig,
    Config,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
)
from qs_jax.engine import dense
from qs_jax.mechanisms import fusion
from qs_jax.models import Params

TEACHER, CONTINUATION = "teacher-forced", "continuation"
MAP_LAYERS = (15, 20, 21, 24)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement."""

    section: str
    name: str
    protocol: str
    quicksilver: QuickSilverConfig

    @property
    def key(self) -> str:
        """Its name in the JSON file."""
        return f"{self.section} | {self.name} | {self.protocol}"


def percentiles(params: Params, rows_NT: np.ndarray, model: ModelConfig) -> dict[str, Any]:
    """Thresholds by the paper's rules, B.2 (25th percentile) and D.3 (15th), and medians.

    "tau_drift" (raw) and "tau_halt" (nats, logit lens) are of "layers"; "tau_fuse" is raw.
    """
    layers = tuple(max(round(share * model.num_layers), 1) for share in (0.4, 0.6, 0.8))
    never = HaltingConfig(tau_drift=np.inf, tau_halt=-np.inf, layers=layers, window=None)
    qs = QuickSilverConfig(halting=never, sink_tokens=0, protect_special=False)
    record = qs_jax.score(params, rows_NT, Config(model, qs, engine="masked")).record
    assert record is not None
    at = [layer - 1 for layer in layers]
    distances = adjacent_distances(params, rows_NT, model)
    compared = [max(model.num_layers // part, 1) - 1 for part in (3, 2, 1.5)]
    return {
        "layers": layers,
        "tau_drift": [float(np.nanpercentile(record.drift[i], 25)) for i in at],
        "tau_halt": [float(np.nanpercentile(record.entropy[i], 25)) for i in at],
        "tau_fuse": float(np.percentile(distances[np.array(compared, int)], 15)),
        "median_drift": [float(np.nanmedian(layer)) for layer in record.drift],
        "median_adjacent_distance": [float(np.median(layer)) for layer in distances],
    }


def adjacent_distances(params: Params, rows_NT: np.ndarray, model: ModelConfig) -> np.ndarray:
    """Raw L2 distance of each token's state to the one before it, `[L, N, T - 1]`."""

    def look(before_BTD, after_BTD, kept):
        del before_BTD, kept
        return fusion.distances(after_BTD[:, 1:], after_BTD[:, :-1], "raw")

    program = jax.jit(lambda tokens_BT: dense.look_at_layers(params, tokens_BT, model, look)[1])
    return np.asarray(program(jnp.asarray(rows_NT)))


def quota(
    stages: dict[int, float], policy: str, score: Any = "attention", tau_kv: float = 0.05
) -> QuickSilverConfig:
    """Shares of the prompt that have stopped after each of some layers; `tau_kv` of "attended"."""
    layers, shares = tuple(stages), tuple(stages.values())
    skip = KVSkipConfig(policy=policy, tau_kv=tau_kv if policy == "attended" else None)
    rule = HaltingConfig(rule="quota", layers=layers, quota=shares, score=score, entropy=None)
    return QuickSilverConfig(halting=rule, kv_skip=skip)


def all_rows(model: ModelConfig, fitted: dict[str, Any]) -> Iterator[Row]:
    """Every row, by section."""
    for protocol in (TEACHER, CONTINUATION):
        yield Row("presets", "off", protocol, presets.off(model))
    for name in presets.SHIPPED:
        yield Row("presets", name, CONTINUATION, presets.NAMES[name](model))
    yield from _policy_rows()
    yield from _bit_rows(model)
    for protocol in (TEACHER, CONTINUATION):
        for name, make in presets.NAMES.items():
            minmax = name.endswith("minmax") and protocol == TEACHER
            if name.startswith("paper") and not minmax:
                yield Row("paper", name, protocol, make(model))
    full = by_percentiles(model, fitted)
    for protocol in (TEACHER, CONTINUATION):
        for name in ("H", "K", "F", "Q", "H+K", "H+K+F", "H+K+F+Q"):
            yield Row("ablation, percentiles", name, protocol, only(full, name))


def _policy_rows() -> Iterator[Row]:
    """KV policies, thresholds of "attended", and scores of the quota."""
    for layer, share in ((24, 0.5), (20, 0.5), (24, 1.0), (15, 0.5), (20, 1.0), (15, 1.0)):
        for policy in ("skip", "attended", "propagate", "extrapolate"):
            name = f"{share:.0%} at layer {layer} | {policy}"
            yield Row("policies", name, CONTINUATION, quota({layer: share}, policy))
    for tau_kv in (0.1, 0.2, 0.4, 0.8):
        for layer in (24, 20):
            qs = quota({layer: 0.5}, "attended", tau_kv=tau_kv)
            yield Row("attended", f"50% at layer {layer}, tau_kv {tau_kv}", CONTINUATION, qs)
    scores: dict[str, Any] = {f"lowest {name}": name for name in ("attention", "random", "drift")}
    for name, score in (scores | {"highest key norm": key_norm}).items():
        qs = quota({20: 0.5}, "extrapolate", score)
        yield Row("scores", f"50% at layer 20, {name} first", CONTINUATION, qs)


def _bit_rows(model: ModelConfig) -> Iterator[Row]:
    """Uniform and adaptive bits, plain and rotated."""
    middle = model.num_layers // 2
    grouped: dict[str, Any] = {"group": 16, "rotate": True}
    int8: Any = {"execution": "int8"}
    settings = {
        "8 bits": AMQConfig.uniform(8, middle, **grouped),
        "4 bits": AMQConfig.uniform(4, middle, **grouped),
        "4 bits, no rotation": AMQConfig.uniform(4, middle, group=16),
        "4 bits, symmetric, group 32": AMQConfig.uniform(4, middle, group=32, symmetric=True),
        "2 bits": AMQConfig.uniform(2, middle, **grouped),
        "adaptive, nats (1.0, 2.3)": AMQConfig(middle, **grouped),
        "adaptive, no 2 bits": AMQConfig(middle, tau_low=float("-inf"), **grouped),
        "8 bits, keys and values": AMQConfig.uniform(8, middle, targets=("kv",), **grouped),
        "8 bits, int8 products": AMQConfig.uniform(8, middle, **int8),
        "4 bits, int8 products": AMQConfig.uniform(4, middle, **int8),
        "8 bits, int8 keys and values": AMQConfig.uniform(8, middle, targets=("kv",), **int8),
    }
    for protocol in (TEACHER, CONTINUATION):
        for name, amq in settings.items():
            yield Row("bits", name, protocol, QuickSilverConfig(amq=amq))


def by_percentiles(model: ModelConfig, fitted: dict[str, Any]) -> QuickSilverConfig:
    """The paper preset with thresholds that act: its own percentile rules on this model."""
    base = presets.NAMES["paper-bits-vocab"](model)
    taus = {name: [0.0] * model.num_layers for name in ("tau_drift", "tau_halt")}
    for name, by_layer in taus.items():
        for layer, tau in zip(fitted["layers"], fitted[name], strict=True):
            by_layer[layer - 1] = tau
    assert base.halting is not None
    assert base.fusion is not None
    settings: dict[str, Any] = {name: tuple(by_layer) for name, by_layer in taus.items()}
    return dataclasses.replace(
        base,
        halting=dataclasses.replace(base.halting, layers=tuple(fitted["layers"]), **settings),
        fusion=dataclasses.replace(base.fusion, tau_fuse=fitted["tau_fuse"]),
    )


def only(full: QuickSilverConfig, letters: str) -> QuickSilverConfig:
    """Some mechanisms of a configuration: any of H, K, F and Q.

    K without H lets flagged tokens keep computing: only their keys are skipped.
    """
    halting = full.halting
    if halting is not None and "H" not in letters:
        halting = dataclasses.replace(halting, freeze=False) if "K" in letters else None
    return dataclasses.replace(
        full,
        halting=halting,
        kv_skip=full.kv_skip if "K" in letters else None,
        fusion=full.fusion if "F" in letters else None,
        amq=full.amq if "Q" in letters else None,
    )
