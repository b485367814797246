"""The masked engine against the NumPy oracle: the same decisions, the same logits."""

import functools
import random
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import qs_jax
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
from qs_jax.engine.overrides import TokenOverrides
from qs_jax.errors import ConfigError
from qs_jax.mechanisms.kv_maps import KVMaps
from qs_jax.testing import oracle_score, tiny_model, tiny_params

VOCAB, DEPTH, WIDTH = 31, 4, 12
LENGTHS, PROMPTS = (12, 9), (10, 7)
COUNTED = "active kv_written kv_held visible_keys bits fused depth representative weighed".split()
MEASURED = ("drift", "entropy")


def architecture(kind: str, dtype: str) -> ModelConfig:
    return tiny_model(
        kind,
        num_layers=DEPTH,
        hidden_size=16,
        num_heads=4,
        num_kv_heads=2 if kind == "llama" else 4,
        head_dim=4,
        mlp_size=24,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_ids=(1,),
        dtype=dtype,
    )


@functools.cache
def a_model(kind: str, dtype: str) -> tuple[ModelConfig, Any]:
    """A random model whose norms and biases are not the identity."""
    model, rng = architecture(kind, dtype), np.random.default_rng(1)
    with jax.enable_x64(dtype == "float64"):
        params = tiny_params(model, scale=30.0)
        nudge = lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(dtype)  # noqa: E731
        return model, jax.tree.map(nudge, params)


def with_maps(params: Any, layers: tuple[int, ...], features: tuple[str, ...], seed: int) -> Any:
    kv = params["layers"]["qkv"]["kernel"].shape[-1] - 16
    dtype = params["final_norm"]["norm"]["scale"].dtype
    shape = (DEPTH, len(layers), 16 * len(features) + 1, kv)
    maps = np.random.default_rng(seed).standard_normal(shape).astype(dtype) / 4
    array = jax.numpy.asarray(maps)
    return params | {"kv_maps": KVMaps(maps_LXFO=array, layers=layers, features=features)}


def rows_of(seed: int, repeats: bool) -> list[list[int]]:
    """Random ids; with `repeats`, few of them, so that neighbours are often alike."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 6 if repeats else VOCAB, n).tolist() for n in LENGTHS]


def check(
    kind: str,
    quicksilver: QuickSilverConfig,
    protocol: str,
    *,
    seed: int = 0,
    repeats: bool = False,
    overrides: dict[str, np.ndarray] | None = None,
    features: tuple[str, ...] = ("state",),
    dtype: str = "float64",
    atol: float = 1e-6,
    knife: float = 1e-9,
) -> Any:
    """The oracle's output, held against the engine's; None at a knife's edge."""
    model, params = a_model(kind, dtype)
    cfg = Config(model=model, quicksilver=quicksilver, protocol=protocol)
    tokens = rows_of(seed, repeats)
    skip = quicksilver.kv_skip
    with jax.enable_x64(dtype == "float64"):
        if skip is not None and skip.policy == "extrapolate":
            assert quicksilver.halting is not None
            params = with_maps(params, quicksilver.halting.layers, features, seed)
        options: dict[str, Any] = {}
        if protocol == "continuation":
            options["prompt_lengths"] = PROMPTS
        if overrides is not None:
            options["overrides"] = TokenOverrides(**overrides)
        expected = oracle_score(params, tokens, cfg, **options)
        if expected.margin < knife:
            return None
        found = qs_jax.score(params, tokens, cfg, return_logits=True, **options)
    real = np.arange(WIDTH) < np.array(LENGTHS)[:, None]
    if found.record is not None:
        for name in COUNTED:
            one, other = getattr(found.record, name), getattr(expected, name)
            np.testing.assert_array_equal(one[..., real], other[..., real], err_msg=name)
        for name in MEASURED:
            one, other = getattr(found.record, name), getattr(expected, name)
            both = real & np.isfinite(one) & np.isfinite(other)
            np.testing.assert_allclose(one[both], other[both], atol=atol, err_msg=name)
    np.testing.assert_allclose(found.logits[real], expected.logits[real], atol=atol)
    return expected


# --- A dozen settings by hand: every mechanism, every option, and proof that each one acted. ---

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
    "bits-variance": coarse(entropy="variance", tau_low=0.05, tau_high=0.4),
    "bits-minmax": coarse(
        normalization="minmax", tau_low=0.3, tau_high=0.6, allow_noncausal=True, rotate=True
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


HAND = [(name, protocol, qs) for name, qs in BOTH.items() for protocol in PROTOCOLS] + [
    (name, protocol, qs) for name, (protocol, qs) in ONE.items()
]
# Every name once by default, families and protocols in turn; the rest are slow.
DEFAULT = {
    (
        name,
        ("gpt2", "llama")[index % 2],
        PROTOCOLS[index // 2 % 2] if name in BOTH else ONE[name][0],
    )
    for index, name in enumerate([*BOTH, *ONE])
}
CASES = [
    pytest.param(
        name,
        kind,
        protocol,
        qs,
        id=f"{name}-{kind}-{protocol}",
        marks=() if (name, kind, protocol) in DEFAULT else pytest.mark.slow,
    )
    for name, protocol, qs in HAND
    for kind in ("gpt2", "llama")
]


@pytest.mark.parametrize(("name", "kind", "protocol", "quicksilver"), CASES)
def test_every_option_does_what_the_oracle_does(name, kind, protocol, quicksilver):
    features = ("state", "embedding") if kind == "llama" else ("state",)
    out = check(kind, quicksilver, protocol, seed=3, features=features)
    assert out is not None, "a knife's edge: take another seed"
    assert acted(out, quicksilver), name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_overrides_of_single_tokens(protocol, kind):
    quicksilver = settings_of(
        halting=halting(), kv_skip=KVSkipConfig(), fusion=FusionConfig(**NEAR)
    )
    plain = check(kind, quicksilver, protocol, seed=3)
    out = check(kind, quicksilver, protocol, seed=3, overrides=MASKS)
    assert out is not None
    assert (out.depth != plain.depth).any()
    assert (out.kv_written & ~plain.kv_written).any()


@pytest.mark.parametrize(
    ("kind", "protocol", "name"),
    [
        ("gpt2", "teacher-forced", "attended"),
        ("llama", "teacher-forced", "fusion-attention"),
        ("llama", "continuation", "delay-retain"),
    ],
)
def test_float32_makes_the_same_decisions(kind, protocol, name):
    options = {"dtype": "float32", "atol": 1e-4, "knife": 1e-5}
    out = check(kind, BOTH[name], protocol, seed=3, **options)
    assert out is not None, "a knife's edge: take another seed"
    assert acted(out, BOTH[name])


# --- Any setting at all. ---

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
        "symmetric": draw(st.booleans()),
        "rotate": draw(st.booleans()),
    }
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


@st.composite
def any_case(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `check`, over the whole space of settings."""
    before = random.getstate()
    try:
        return _any_case(draw)
    finally:
        random.setstate(before)  # beartype draws from it, which Hypothesis forbids in a strategy


def _any_case(draw: st.DrawFn) -> dict[str, Any]:
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
    amq = parts.get("amq")
    # Bits that wait for the whole batch cannot wait for the token before as well.
    assume(not (amq and amq.normalization == "minmax" and "final_prev" in quicksilver.entropies))
    overrides = None
    if draw(st.booleans()):
        rng, shape = np.random.default_rng(draw(st.integers(0, 99))), (2, WIDTH)
        overrides = {
            "full_processing": rng.random(shape) < 0.1,
            "retain_kv": rng.random(shape) < 0.2,
        }
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


def holds(case: dict[str, Any]) -> None:
    assume(
        check(case.pop("kind"), case.pop("quicksilver"), case.pop("protocol"), **case) is not None
    )


SLOW_DATA = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@given(any_case())
@settings(max_examples=25, suppress_health_check=SLOW_DATA)
def test_any_setting_does_what_the_oracle_does(case):
    holds(case)


@pytest.mark.slow
@given(any_case())
@settings(max_examples=200, suppress_health_check=SLOW_DATA)
def test_many_settings_do_what_the_oracle_does(case):
    holds(case)
