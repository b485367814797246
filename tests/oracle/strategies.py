"""Hypothesis strategies: other numbers for a setting, and any settings together."""

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from qs_jax.config import PROTOCOLS, QuickSilverConfig
from qs_jax.errors import ConfigError
from tests.oracle.comparison import DEPTH, PROMPTS, VOCAB, WIDTH, architecture
from tests.oracle.settings import BOTH, ONE

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
            tau_halt=draw(per_layer(*ENTROPY[qs.halting.entropy or "vocab"])),
            window=(low, high) if qs.halting.layers is None else qs.halting.window,
        )
    elif qs.halting is not None and qs.halting.light_from is None:
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
        ends = ENTROPY[qs.amq.entropy] if qs.amq.normalization == "nats" else (0.1, 0.95)
        taus = sorted(draw(st.tuples(*[st.floats(*ends)] * 2)))
        parts["amq"] = dataclasses.replace(
            qs.amq, layer=draw(LAYERS), tau_low=taus[0], tau_high=taus[1]
        )
    exempt = {"sink_tokens": draw(st.integers(0, 2)), "recent_tokens": draw(st.integers(0, 3))}
    near = st.sampled_from([length - less for length in PROMPTS for less in (0, 1)])
    over = [(draw(near), draw(st.integers(0, 4))) for _ in qs.recent_tokens_over]
    exempt["recent_tokens_over"] = tuple(sorted(dict(over).items()))
    return dataclasses.replace(qs, **parts, **exempt)


@leaving_random_alone
def any_case(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `check`: any mechanisms of the settings by hand together, with any numbers."""
    protocol = draw(st.sampled_from(PROTOCOLS))
    known = [*BOTH.values(), *(qs for only, qs in ONE.values() if only == protocol)]
    stops, fuses, codes = (draw(st.sampled_from(known)) for _ in range(3))
    try:
        quicksilver = dataclasses.replace(
            stops,
            fusion=fuses.fusion,
            amq=codes.amq,
            shortlist_layer=1,
            shortlist_size=8,
            protect_ids=draw(st.lists(st.integers(0, VOCAB - 1), max_size=4).map(tuple)),
        )
        quicksilver = draw(retuned(quicksilver))
        quicksilver.check(architecture("gpt2", "float64"), protocol)
    except ConfigError:
        assume(False)
    overrides = None
    if not quicksilver.is_off and draw(st.booleans()):
        rng, shape = np.random.default_rng(draw(st.integers(0, 99))), (2, WIDTH)
        overrides = {"full_processing": rng.random(shape) < 0.1}
        skip, halting = quicksilver.kv_skip, quicksilver.halting
        if skip is not None and skip.policy in ("skip", "attended"):
            overrides["retain_kv"] = rng.random(shape) < 0.2
        if halting is not None:
            chosen = rng.choice(halting.layers or tuple(range(1, DEPTH)), shape)
            overrides["forced_halt"] = np.where(rng.random(shape) < 0.15, chosen, 0)
    return {
        "kind": draw(st.sampled_from(["gpt2", "llama", "qwen3"])),
        "quicksilver": quicksilver,
        "protocol": protocol,
        "seed": draw(st.integers(0, 999)),
        "repeats": draw(st.booleans()),
        "overrides": overrides,
    }
