"""Configurations every engine must hold the laws under: add a row, get all tests."""

import dataclasses
import functools

import jax
import pytest

from qs_jax import presets
from qs_jax.config import (
    PROTOCOLS,
    AMQConfig,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
)
from qs_jax.testing import tiny_model, tiny_params

LAYERS = 6
SCALE = 30.0  # of the embeddings: entropies between 0 and log V, so thresholds have something to do

HALT = HaltingConfig(drift="relative", tau_drift=0.6, tau_halt=3.8, window=(1, 4))
FLAG = HaltingConfig(drift="relative", tau_drift=0.6, tau_halt=3.8, window=(1, 4), freeze=False)
SKIP = KVSkipConfig("attended", tau_kv=0.15)
FUSE = FusionConfig(
    tau_fuse=1.2,
    distance="relative",
    window=3,
    tau_attn=-0.05,
    alpha="attention",
    proportional_attention=True,
)
BITS = AMQConfig(layer=2, tau_low=1.0, tau_high=3.0, targets=("linear", "hidden", "kv"), group=8)
INT8 = AMQConfig(
    layer=2, tau_low=1.0, tau_high=3.0, targets=("linear", "kv"), group=8, execution="int8"
)
QUOTA = HaltingConfig(rule="quota", layers=(2, 4), quota=(0.4, 0.8), entropy=None)


def settings(**parts) -> QuickSilverConfig:
    return QuickSilverConfig(sink_tokens=1, recent_tokens=3, **parts)


# H, K, F, Q alone, all pairs, all together, and the quota rule. K alone flags tokens and skips
# their keys without stopping them.
MATRIX = {
    "H": settings(halting=HALT),
    "K": settings(halting=FLAG, kv_skip=SKIP),
    "F": settings(fusion=FUSE),
    "Q": settings(amq=BITS),
    "HK": settings(halting=HALT, kv_skip=SKIP),
    "HF": settings(halting=HALT, fusion=FUSE),
    "HQ": settings(halting=HALT, amq=BITS),
    "KF": settings(halting=FLAG, kv_skip=SKIP, fusion=FUSE),
    "KQ": settings(halting=FLAG, kv_skip=SKIP, amq=BITS),
    "FQ": settings(fusion=FUSE, amq=BITS),
    "HKFQ": settings(halting=HALT, kv_skip=SKIP, fusion=FUSE, amq=BITS),
    "int8": settings(halting=HALT, kv_skip=SKIP, amq=INT8),
    "quota": settings(halting=QUOTA, kv_skip=KVSkipConfig("skip", delay=1), fusion=FUSE, amq=BITS),
}

PAIRS = tuple(f"{name}-" for name in MATRIX if len(name) == 2)


def model_of(kind: str, **changes) -> ModelConfig:
    return tiny_model(kind, num_layers=LAYERS, **changes)


@functools.cache
def params_of(model: ModelConfig):
    """Not to be changed: tests share them."""
    with jax.enable_x64(model.dtype == "float64"):
        return tiny_params(model, scale=SCALE)


def preset_settings() -> dict[str, QuickSilverConfig]:
    """Every preset; with exemptions short enough for these rows, and once with the paper's
    thresholds scaled to states this small, so that each mechanism in it acts."""
    model = model_of("llama")
    found = {
        name: dataclasses.replace(presets.NAMES[name](model), sink_tokens=1, recent_tokens=3)
        for name in ("off", "paper", "balanced", "aggressive")
    }
    paper = found["paper"]
    found["paper-scaled"] = dataclasses.replace(
        paper,
        halting=dataclasses.replace(paper.halting, drift="relative", tau_drift=0.7, tau_halt=4.2),
        fusion=dataclasses.replace(paper.fusion, distance="relative", tau_fuse=1.2),
        amq=dataclasses.replace(paper.amq, tau_low=2.9, tau_high=3.1),
    )
    aggressive = found["aggressive"]
    found["aggressive-scaled"] = dataclasses.replace(
        aggressive, fusion=dataclasses.replace(aggressive.fusion, tau_fuse=1.2)
    )
    return found


def _cases():
    for name, qs in MATRIX.items():
        yield f"{name}-llama", "llama", qs
    for name in ("H", "HKFQ"):
        yield f"{name}-gpt2", "gpt2", MATRIX[name]
    for name, qs in preset_settings().items():
        yield f"preset-{name}", "llama", qs


# (family, configuration, protocol) of the whole matrix and every preset, by name.
CASES: dict[str, tuple[str, QuickSilverConfig, str]] = {
    f"{name}-{protocol}": (kind, qs, protocol)
    for name, kind, qs in _cases()
    for protocol in PROTOCOLS
    if protocol == "continuation" or qs.prompts_only is None
}
# Each mechanism, all of them and every preset; `make test-all` adds pairs and other protocols.
BY_DEFAULT = {
    name
    for name, (_, _, protocol) in CASES.items()
    if not name.startswith(PAIRS)
    and (protocol == "teacher-forced" or name.startswith(("HKFQ-llama", "quota", "preset-")))
    and name not in ("preset-paper-continuation", "preset-off-continuation")
}


def contract(by_default=BY_DEFAULT):
    """Parameters of a test that holds for every case; those of one case run in one process."""
    return [
        pytest.param(
            name,
            marks=[pytest.mark.xdist_group(name)] + [pytest.mark.slow] * (name not in by_default),
        )
        for name in CASES
    ]
