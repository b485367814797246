"""Settings by hand: every mechanism, every option, and proof that each one acted."""

from typing import Any

import numpy as np

from qs_jax.config import (
    PROTOCOLS,
    AMQConfig,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    QuickSilverConfig,
)
from tests.oracle.comparison import DEPTH, LENGTHS, WIDTH

DUAL: dict[str, Any] = {"drift": "relative", "tau_drift": 0.7, "tau_halt": 2.6}
QUOTA: dict[str, Any] = {"rule": "quota", "layers": (1, 3), "quota": (0.4, 0.8)}
NEAR: dict[str, Any] = {"distance": "relative", "tau_fuse": 1.2}
COARSE: dict[str, Any] = {"layer": 1, "group": 4, "tau_low": 1.8, "tau_high": 2.4}
SHORT: dict[str, Any] = {"shortlist_layer": 1, "shortlist_size": 8}
MASKS = {
    "full_processing": np.arange(2 * WIDTH).reshape(2, WIDTH) % 5 == 0,
    "forced_halt": np.where(np.arange(2 * WIDTH).reshape(2, WIDTH) % 4 == 1, 2, 0),
    "retain_kv": np.arange(2 * WIDTH).reshape(2, WIDTH) % 3 == 1,
}


def settings_of(**parts: Any) -> QuickSilverConfig:
    return QuickSilverConfig(**({"sink_tokens": 1, "recent_tokens": 1} | parts))


def halting(**fields: Any) -> HaltingConfig:
    return HaltingConfig(**(DUAL | fields))


def quota(**fields: Any) -> HaltingConfig:
    return HaltingConfig(**(QUOTA | fields))


def fusing(**fields: Any) -> QuickSilverConfig:
    return settings_of(fusion=FusionConfig(**(NEAR | fields)))


def coarse(**fields: Any) -> QuickSilverConfig:
    return settings_of(amq=AMQConfig(**(COARSE | fields)), **SHORT)


BOTH: dict[str, QuickSilverConfig] = {
    "dual": settings_of(halting=halting()),
    "raw-drift": settings_of(halting=halting(drift="raw", tau_drift=2.5, entropy=None)),
    "cosine-drift": settings_of(halting=halting(drift="cosine", tau_drift=0.2)),
    "per-layer": settings_of(
        halting=halting(tau_drift=(0.5, 0.6, 0.9, 0.1), tau_halt=(3.0, 1.5, 3.3, 0.0))
    ),
    "window": settings_of(halting=halting(tau_drift=1.0, window=(2, 3), min_layer=3)),
    "latent": settings_of(halting=halting(entropy="latent", tau_halt=2.35)),
    "variance": settings_of(halting=halting(entropy="variance", tau_halt=0.5)),
    "shortlist": settings_of(halting=halting(entropy="shortlist", tau_halt=1.6), **SHORT),
    "skip": settings_of(halting=halting(), kv_skip=KVSkipConfig()),
    "delay-retain": settings_of(
        halting=halting(tau_drift=1.0), kv_skip=KVSkipConfig(delay=1, retain_ids=(4, 5, 6))
    ),
    "attended": settings_of(halting=halting(), kv_skip=KVSkipConfig(policy="attended", tau_kv=0.3)),
    "attended-delay": settings_of(
        halting=halting(tau_drift=1.0),
        kv_skip=KVSkipConfig(policy="attended", tau_kv=0.4, delay=1, retain_ids=(7,)),
    ),
    "propagate": settings_of(halting=halting(), kv_skip=KVSkipConfig(policy="propagate")),
    "no-freeze": settings_of(halting=halting(freeze=False), kv_skip=KVSkipConfig()),
    "extrapolate": settings_of(
        halting=halting(layers=(1, 3), forced_ids=(2, 3, 4, 5), forced_layer=3),
        kv_skip=KVSkipConfig(policy="extrapolate"),
        amq=AMQConfig(**COARSE, targets=("kv",)),
    ),
    "forced": settings_of(
        halting=halting(tau_drift=0.0, window=(2, 3), forced_ids=(3, 4, 5), forced_layer=1),
        protect_ids=(4,),
        protect_special=False,
    ),
    "fusion": fusing(),
    "raw-fusion": fusing(distance="raw", tau_fuse=7.0, first_layer=2, last_layer=2),
    "fusion-window": fusing(window=4, tau_attn=-0.1),
    "fusion-attention": fusing(alpha="attention", proportional_attention=True),
    "fusion-probability": fusing(alpha="probability", window=3, tau_attn=-0.3),
    "fusion-context": fusing(tau_ctx=0.7, context=3),
    "bits-linear": coarse(targets=("linear",), group=8),
    "bits-hidden": coarse(targets=("hidden",), group=16, rotate=True, layer=2),
    "bits-kv": coarse(targets=("kv",), group=2, symmetric=True),
    "bits-log": coarse(normalization="log_vocab", tau_low=0.52, tau_high=0.7),
    "bits-latent": coarse(entropy="latent", normalization="log_vocab", tau_low=0.8, tau_high=0.86),
    "bits-shortlist": coarse(
        entropy="shortlist", normalization="log_vocab", tau_low=0.65, tau_high=0.85
    ),
    "bits-variance": coarse(entropy="variance", tau_low=0.25, tau_high=0.4),
    "bits-minmax": coarse(
        normalization="minmax", tau_low=0.3, tau_high=0.6, allow_noncausal=True, rotate=True
    ),
    "bits-int8": settings_of(
        amq=AMQConfig(
            layer=1,
            tau_low=1.8,
            tau_high=2.4,
            targets=("linear", "hidden", "kv"),
            group=4,
            execution="int8",
        )
    ),
    "bits-uniform": settings_of(amq=AMQConfig.uniform(4, 1, group=4, targets=("linear", "kv"))),
    "all": settings_of(
        halting=halting(tau_drift=0.6),
        kv_skip=KVSkipConfig(policy="attended", tau_kv=0.3),
        fusion=FusionConfig(**NEAR, alpha="attention", window=2, tau_attn=-0.1),
        amq=AMQConfig(**COARSE, targets=("linear", "hidden", "kv")),
    ),
}
ONE: dict[str, tuple[str, QuickSilverConfig]] = {
    "final-prev": ("teacher-forced", settings_of(halting=halting(entropy="final_prev"))),
    "bits-final-prev": ("teacher-forced", coarse(entropy="final_prev")),
    "quota-attention": ("continuation", settings_of(halting=quota(score_queries=3))),
    "quota-drift": ("continuation", settings_of(halting=quota(score="drift", drift="cosine"))),
    "quota-entropy": ("continuation", settings_of(halting=quota(score="entropy"))),
    "quota-random": ("continuation", settings_of(halting=quota(score="random", seed=5))),
    "quota-forced": (
        "continuation",
        settings_of(
            halting=quota(forced_ids=(2, 3, 4, 5), forced_layer=1),
            kv_skip=KVSkipConfig(policy="extrapolate"),
            fusion=FusionConfig(**NEAR),
            sink_tokens=0,
            recent_tokens=2,
        ),
    ),
    "light": (
        "continuation",
        settings_of(
            halting=quota(layers=(3,), quota=(1.0,), light_from=2),
            kv_skip=KVSkipConfig(policy="extrapolate"),
            recent_tokens_over=((7, 3),),  # one of the two prompts is longer
        ),
    ),
    "light-share": (
        "continuation",
        settings_of(
            halting=quota(
                layers=(3,),
                quota=(1.0,),
                light_from=2,
                light_share=0.6,
                forced_ids=(3, 4, 5, 6),
                forced_layer=3,
            ),
            kv_skip=KVSkipConfig(policy="extrapolate"),
            sink_tokens=0,
            recent_tokens=2,
        ),
    ),
    "light-once": (
        "continuation",
        settings_of(
            halting=quota(layers=(2,), quota=(1.0,), light_from=2, forced_ids=(3,), forced_layer=2),
            kv_skip=KVSkipConfig(policy="extrapolate"),
            protect_ids=(4, 5, 6),
        ),
    ),
}


def acted(out: Any, quicksilver: QuickSilverConfig) -> bool:
    """Every mechanism that is on left a trace, and the logits are not those of the dense model."""
    real = np.arange(WIDTH) < np.array(LENGTHS)[:, None]
    layer = np.arange(1, DEPTH + 1)[:, None, None]
    halted = (out.depth < DEPTH) & real
    traces = []
    if quicksilver.halting is not None:
        traces.append(halted.any() and not (halted == real).all())
    if quicksilver.kv_skip is not None and quicksilver.kv_skip.policy in ("skip", "attended"):
        traces.append((~out.kv_written & halted & (layer > out.depth)).any())
        brings_back = quicksilver.kv_skip.policy == "attended" or quicksilver.kv_skip.delay > 0
        traces.append(not brings_back or (out.kv_written & halted & (layer > out.depth)).any())
    if quicksilver.fusion is not None:
        traces.append((out.representative != np.arange(WIDTH))[real].any() and out.weighed.any())
    if quicksilver.amq is not None:
        seen = set(out.bits[-1][real].tolist()) & {2, 4, 8}
        traces.append({2, 8} <= seen if quicksilver.amq.entropy else seen == {4, 8})
    return all(traces)


# Each option once, families and protocols in turn, and every other way.
ONCE = {
    name: (
        ("gpt2", "llama")[index // 2 % 2],
        ONE[name][0] if name in ONE else PROTOCOLS[index // 4 % 2],
        ONE[name][1] if name in ONE else BOTH[name],
    )
    for index, name in enumerate([*BOTH, *ONE])
}
OTHERS = {
    f"{name}-{kind}-{protocol}": (kind, protocol, qs)
    for name, (_, only, qs) in ONCE.items()
    for kind in ("gpt2", "llama")
    for protocol in ((only,) if name in ONE else PROTOCOLS)
    if (kind, protocol) != ONCE[name][:2]
}
