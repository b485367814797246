"""Configurations every engine must hold the laws under: add a row, get all tests."""

import dataclasses
import functools

import jax
import pytest

from benchmarks.ablation import all_four
from qs_jax import presets
from qs_jax.config import (
    PROTOCOLS,
    AMQConfig,
    Config,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
)
from qs_jax.testing import tiny_model, tiny_params
from tests.oracle.comparison import with_maps

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


# Exempt tokens differ among the goldens' two prompts and the prompt engine's three.
LIGHT = settings(
    halting=HaltingConfig(rule="quota", layers=(4,), quota=(1.0,), light_from=3),
    kv_skip=KVSkipConfig("extrapolate"),
    recent_tokens_over=((9, 5), (13, 4)),
)

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
    "light": LIGHT,
}

PAIRS = tuple(f"{name}-" for name in MATRIX if len(name) == 2)


def model_of(kind: str, **changes) -> ModelConfig:
    return tiny_model(kind, num_layers=LAYERS, **changes)


@functools.cache
def params_of(model: ModelConfig):
    """Not to be changed: tests share them."""
    with jax.enable_x64(model.dtype == "float64"):
        return tiny_params(model, scale=SCALE)


def params_under(cfg: Config):
    """The same, with random maps and light layers where the configuration reads any."""
    params, qs = params_of(cfg.model), cfg.quicksilver
    return params if qs is None else with_maps(params, cfg.model, qs, cfg.protocol, 0)


def preset_settings() -> dict[str, QuickSilverConfig]:
    """Every preset; with exemptions short enough for these rows, and once with the paper's
    thresholds scaled to states this small, so that each mechanism in it acts."""
    model = model_of("llama")
    found = {
        name: dataclasses.replace(presets.NAMES[name](model), sink_tokens=1, recent_tokens=3)
        for name in ("off", "paper", "balanced", "small-cache")
    }
    found["all-four"] = dataclasses.replace(all_four(model), sink_tokens=1, recent_tokens=3)
    paper = found["paper"]
    found["paper-scaled"] = dataclasses.replace(
        paper,
        halting=dataclasses.replace(paper.halting, drift="relative", tau_drift=0.7, tau_halt=4.2),
        fusion=dataclasses.replace(paper.fusion, distance="relative", tau_fuse=1.2),
        amq=dataclasses.replace(paper.amq, tau_low=2.9, tau_high=3.1),
    )
    fusion = dataclasses.replace(found["all-four"].fusion, tau_fuse=1.2)
    found["all-four-scaled"] = dataclasses.replace(found["all-four"], fusion=fusion)
    return found


def _cases():
    for name, qs in MATRIX.items():
        yield f"{name}-llama", "llama", qs
    for name in ("H", "HKFQ", "light"):
        yield f"{name}-gpt2", "gpt2", MATRIX[name]
    for name in ("HKFQ", "quota"):
        yield f"{name}-mistral", "mistral", MATRIX[name]
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
    and (
        protocol == "teacher-forced"
        or name.startswith(("HKFQ-llama", "quota", "light-gpt2", "preset-"))
    )
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


# --- what the fast engines run ------------------------------------------------------------------

ADJACENT = dataclasses.replace(
    FUSE, window=1, tau_attn=None, alpha="uniform", proportional_attention=False
)
FAST = {
    "dense": None,
    "dual-skip": settings(
        halting=HALT, kv_skip=KVSkipConfig("skip", delay=1, retain_ids=tuple(range(3, 11)))
    ),
    "dual-propagate-kv8": settings(halting=HALT, amq=dataclasses.replace(INT8, targets=("kv",))),
    "dual-extrapolate": settings(
        halting=dataclasses.replace(HALT, layers=(2, 3)), kv_skip=KVSkipConfig("extrapolate")
    ),
    "quota-skip": settings(halting=QUOTA, kv_skip=KVSkipConfig("skip", delay=1)),
    "quota-fusion-int8": settings(
        halting=QUOTA, kv_skip=KVSkipConfig("skip", delay=1), fusion=ADJACENT, amq=INT8
    ),
    "quota-extrapolate": settings(halting=QUOTA, kv_skip=KVSkipConfig("extrapolate")),
    "dual-int8": settings(halting=HALT, kv_skip=KVSkipConfig("skip"), amq=INT8),
    "dual-fusion-int8": settings(halting=HALT, fusion=ADJACENT, amq=INT8),
    "dual-forced": settings(
        halting=dataclasses.replace(HALT, forced_ids=(3, 5, 7, 9, 11, 13, 20, 30), forced_layer=2)
    ),
    "dual-shortlist": settings(
        halting=dataclasses.replace(HALT, entropy="shortlist", window=(2, 4)),
        shortlist_layer=2,
        shortlist_size=8,
    ),
    "quota-drift": settings(halting=dataclasses.replace(QUOTA, score="drift")),
    "quota-entropy-int8": settings(
        halting=dataclasses.replace(QUOTA, score="entropy", entropy="latent"), amq=INT8
    ),
    "fusion": settings(fusion=ADJACENT),
    "int8": settings(amq=INT8),
    "light": dataclasses.replace(
        LIGHT, halting=dataclasses.replace(LIGHT.halting, light_share=0.7)
    ),
    "light-gpt2": LIGHT,
}
# A relative of Llama with all that sets relatives apart; halted keys leave its window, too.
RELATIVE = {"sliding_window": 7, "qkv_bias": True}
FAST |= {f"{name}-qwen3": FAST[name] for name in ("dense", "dual-skip", "quota-extrapolate")}
FAST |= {f"{name}-qwen3": FAST[name] for name in ("quota-fusion-int8", "light")}


def fast_case(name: str, protocol: str | None, **fields):
    """Parameters, with random maps where they are read, and a configuration, in float64."""
    kind = name.rpartition("-")[2]
    more = {"gpt2": {}, "qwen3": RELATIVE}
    model = model_of(kind if kind in more else "llama", dtype="float64", **more.get(kind, {}))
    cfg = Config(model, FAST[name], protocol=protocol, **{"eos_token_ids": ()} | fields)
    return params_under(cfg), cfg


def few(names, *by_default):
    """Parameters of a test of all these names, others than those few in the slow suite.

    A name may be a tuple, of several parameters.
    """
    return [
        pytest.param(
            *(name if isinstance(name, tuple) else (name,)),
            marks=[pytest.mark.slow] * (name not in by_default),
        )
        for name in names
    ]
