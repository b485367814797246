"""Hypothesis strategies over the whole space of settings."""

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from qs_jax.config import (
    PROTOCOLS,
    AMQConfig,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    QuickSilverConfig,
)
from qs_jax.errors import ConfigError
from tests.oracle.comparison import DEPTH, VOCAB, WIDTH, architecture

ENTROPY = {  # around the values that random models have
    "vocab": (0.3, 3.4),
    "final_prev": (0.3, 3.4),
    "shortlist": (0.3, 2.2),
    "latent": (2.0, 2.7),
    "variance": (-1.5, 1.5),
}
DRIFT = {"relative": (0.4, 1.0), "raw": (1.5, 4.0), "cosine": (0.05, 0.4)}
LAYERS = st.integers(1, DEPTH - 1)


def per_layer(low: float, high: float) -> st.SearchStrategy:
    one = st.floats(low, high)
    return one | st.tuples(*[one] * DEPTH)


def ids(least: int = 0) -> st.SearchStrategy:
    return st.lists(st.integers(0, VOCAB - 1), min_size=least, max_size=4).map(tuple)


@st.composite
def haltings(draw: st.DrawFn, online: bool) -> HaltingConfig:
    drift = draw(st.sampled_from(sorted(DRIFT)))
    entropy = draw(st.sampled_from([name for name in ENTROPY if online or name != "final_prev"]))
    fields: dict[str, Any] = {
        "drift": drift,
        "tau_drift": draw(per_layer(*DRIFT[drift])),
        "entropy": draw(st.sampled_from([entropy, entropy, None])),
        "tau_halt": draw(per_layer(*ENTROPY[entropy])),
        "window": draw(st.none() | st.tuples(LAYERS, LAYERS).map(lambda ends: tuple(sorted(ends)))),
        "min_layer": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "freeze": draw(st.sampled_from([True, True, True, False])),
    }
    first, last = fields["window"] or (1, DEPTH - 1)
    inside = list(range(max(first, fields["min_layer"]), last + 1))
    quota = not online and draw(st.booleans())
    if inside and (quota or draw(st.booleans())):
        fields["layers"] = tuple(sorted(draw(st.sets(st.sampled_from(inside), min_size=1))))
    if inside and quota:
        count = len(fields["layers"])
        shares = st.lists(st.integers(1, 20), min_size=count, max_size=count)
        fields |= {
            "rule": "quota",
            "quota": tuple(share / 20 for share in sorted(draw(shares))),
            "score": draw(
                st.sampled_from(["attention", "attention", "drift", "entropy", "random"])
            ),
            "score_queries": draw(st.integers(1, 12)),
            "seed": draw(st.integers(0, 5)),
        }
    if draw(st.booleans()):
        layers = st.sampled_from(fields["layers"]) if "layers" in fields else LAYERS
        fields |= {"forced_ids": draw(ids(1)), "forced_layer": draw(layers)}
    return HaltingConfig(**fields)


@st.composite
def skips(draw: st.DrawFn, halting: HaltingConfig) -> KVSkipConfig | None:
    known = ["skip", "attended"]
    if halting.freeze:
        known += [None, "propagate", *["extrapolate"] * 2 * (halting.layers is not None)]
    policy = draw(st.sampled_from(known))
    if policy in (None, "propagate", "extrapolate"):
        return KVSkipConfig(policy=policy) if policy else None
    tau = draw(st.floats(0.05, 0.4)) if policy == "attended" else None
    delay = draw(st.sampled_from([0, 0, 1, 2]))
    return KVSkipConfig(policy=policy, tau_kv=tau, delay=delay, retain_ids=draw(ids()))


@st.composite
def fusions(draw: st.DrawFn) -> FusionConfig:
    distance, far = draw(st.sampled_from([("relative", (0.7, 1.4)), ("raw", (2.0, 5.0))]))
    first, window = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 1, 2, 5]))
    tau = draw(per_layer(*far))
    if isinstance(tau, tuple):
        tau = (0.0,) * (first - 1) + tau[first - 1 :]
    return FusionConfig(
        tau_fuse=tau,
        distance=distance,
        first_layer=first,
        last_layer=draw(st.none() | st.integers(first, DEPTH - 1)),
        window=window,
        tau_attn=draw(st.floats(-0.3, 0.2)) if window > 1 else None,
        alpha=draw(st.sampled_from(["uniform", "attention", "probability"])),
        proportional_attention=draw(st.booleans()),
        tau_ctx=draw(st.none() | st.floats(*far)),
        context=draw(st.integers(1, 5)),
    )


@st.composite
def amqs(draw: st.DrawFn, online: bool) -> AMQConfig:
    shared: dict[str, Any] = {
        "layer": draw(LAYERS),
        "targets": tuple(
            sorted(draw(st.sets(st.sampled_from(["linear", "hidden", "kv"]), min_size=1)))
        ),
    }
    if shared["targets"] != ("hidden",) and draw(st.integers(0, 3)) == 0:
        shared["execution"] = draw(st.sampled_from(["int8", "auto"]))
    else:
        shared |= {"symmetric": draw(st.booleans()), "rotate": draw(st.booleans())}
    groups = [1, 2, 4]
    if "kv" not in shared["targets"]:
        groups += [8] if "linear" in shared["targets"] else [8, 16]
    shared["group"] = draw(st.sampled_from(groups))
    if draw(st.integers(0, 5)) == 0:
        return AMQConfig.uniform(draw(st.sampled_from([2, 4, 8])), **shared)
    entropy = draw(st.sampled_from([name for name in ENTROPY if online or name != "final_prev"]))
    scale = draw(st.sampled_from(["nats", "log_vocab", "minmax"]))
    low, high = ENTROPY[entropy]
    if scale == "log_vocab":
        low, high = (0.75, 0.95) if entropy == "latent" else (0.1, 0.95)
    if scale == "minmax":
        low, high = 0.1, 0.9
    taus = sorted([draw(st.floats(low, high)), draw(st.floats(low, high))])
    return AMQConfig(
        entropy=entropy,
        normalization=scale,
        tau_low=taus[0],
        tau_high=taus[1],
        allow_noncausal=True,
        **shared,
    )


def leaving_random_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """A strategy in which beartype may draw from `random`, which Hypothesis forbids."""

    @functools.wraps(function)
    def draw_from(*args: Any) -> Any:
        before = random.getstate()
        try:
            return function(*args)
        finally:
            random.setstate(before)

    return st.composite(draw_from)


@leaving_random_alone
def retuned(draw: st.DrawFn, qs: QuickSilverConfig) -> QuickSilverConfig:
    """The same mechanisms with other numbers: thresholds, shares, layers and ids of one program."""
    parts: dict[str, Any] = {}
    low, high = sorted([draw(LAYERS), draw(LAYERS)])
    if qs.halting is not None and qs.halting.rule == "dual":
        parts["halting"] = dataclasses.replace(
            qs.halting,
            tau_drift=draw(per_layer(*DRIFT[qs.halting.drift])),
            tau_halt=draw(per_layer(*ENTROPY[qs.halting.entropy])),
            window=(low, high),
        )
    elif qs.halting is not None:
        parts["halting"] = dataclasses.replace(
            qs.halting, quota=tuple(sorted(draw(st.tuples(*[st.floats(0, 1)] * 2))))
        )
    if qs.kv_skip is not None and qs.kv_skip.policy == "attended":
        tau, delay = draw(st.floats(0.05, 0.4)), draw(st.integers(0, 2))
        parts["kv_skip"] = dataclasses.replace(qs.kv_skip, tau_kv=tau, delay=delay)
    if qs.fusion is not None:
        far = {"relative": (0.7, 1.4), "raw": (2.0, 5.0)}[qs.fusion.distance]
        parts["fusion"] = dataclasses.replace(
            qs.fusion, tau_fuse=draw(st.floats(*far)), first_layer=low, last_layer=high
        )
    if qs.amq is not None and qs.amq.entropy is not None:
        taus = sorted(draw(st.tuples(*[st.floats(*ENTROPY[qs.amq.entropy])] * 2)))
        parts["amq"] = dataclasses.replace(
            qs.amq, layer=draw(LAYERS), tau_low=taus[0], tau_high=taus[1]
        )
    exempt = {"sink_tokens": draw(st.integers(0, 2)), "recent_tokens": draw(st.integers(0, 3))}
    return dataclasses.replace(qs, **parts, **exempt)


@leaving_random_alone
def any_case(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `check`, over the whole space of settings."""
    protocol = draw(st.sampled_from(PROTOCOLS))
    online = protocol == "teacher-forced"
    parts: dict[str, Any] = {}
    try:
        if draw(st.integers(0, 4)) > 0:
            parts["halting"] = draw(haltings(online))
            parts["kv_skip"] = draw(skips(parts["halting"]))
        if draw(st.integers(0, 4)) > 1:
            parts["fusion"] = draw(fusions())
        if draw(st.integers(0, 4)) > 1:
            parts["amq"] = draw(amqs(online))
        quicksilver = QuickSilverConfig(
            **parts,
            protect_ids=draw(ids()),
            protect_special=draw(st.booleans()),
            sink_tokens=draw(st.integers(0, 2)),
            recent_tokens=draw(st.integers(0, 3)),
            shortlist_layer=1,
            shortlist_size=draw(st.sampled_from([2, 8, VOCAB])),
        )
        quicksilver.check(architecture("gpt2", "float64"), protocol)
    except ConfigError:
        assume(False)
    overrides = None
    if not quicksilver.is_off and draw(st.booleans()):
        rng, shape = np.random.default_rng(draw(st.integers(0, 99))), (2, WIDTH)
        overrides = {"full_processing": rng.random(shape) < 0.1}
        skip = parts.get("kv_skip")
        if skip is not None and skip.policy in ("skip", "attended"):
            overrides["retain_kv"] = rng.random(shape) < 0.2
        halting = parts.get("halting")
        if halting is not None:
            layers = halting.layers or tuple(range(1, DEPTH))
            chosen = rng.choice(layers, shape)
            overrides["forced_halt"] = np.where(rng.random(shape) < 0.15, chosen, 0)
    return {
        "kind": draw(st.sampled_from(["gpt2", "llama"])),
        "quicksilver": quicksilver,
        "protocol": protocol,
        "seed": draw(st.integers(0, 999)),
        "repeats": draw(st.booleans()),
        "overrides": overrides,
        "features": draw(st.sampled_from([("state",), ("state", "embedding")])),
    }
