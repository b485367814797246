"""Tiny models and the comparison of engine and oracle."""

import functools
from typing import Any

import jax
import numpy as np

import qs_jax
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.engine.inputs import TokenOverrides
from qs_jax.mechanisms.kv_maps import FEATURES, KVMaps, feature_count
from qs_jax.mechanisms.light import LightLayer
from qs_jax.testing import tiny_model, tiny_params
from tests.oracle import oracle_score
from tests.oracle.model import rotation

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
        num_kv_heads=4 if kind == "gpt2" else 2,
        head_dim=4,
        mlp_size=24,
        vocab_size=VOCAB,
        bos_token_id=0,
        eos_token_ids=(1,),
        dtype=dtype,
        # One relative with all that sets relatives apart.
        **({"sliding_window": 5, "qkv_bias": True} if kind == "qwen3" else {}),
    )


@functools.cache
def a_model(kind: str, dtype: str) -> tuple[ModelConfig, Any]:
    """A random model whose norms and biases are not the identity."""
    model, rng = architecture(kind, dtype), np.random.default_rng(1)
    with jax.enable_x64(dtype == "float64"):
        params = tiny_params(model, scale=30.0)
        nudge = lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(dtype)  # noqa: E731
        return model, jax.tree.map(nudge, params)


def with_maps(
    params: Any, model: ModelConfig, quicksilver: QuickSilverConfig, protocol: str | None, seed: int
) -> Any:
    """Random maps and light layers, where the settings read any: of prompts, all that they may."""
    halting, skip = quicksilver.halting, quicksilver.kv_skip
    if halting is None or skip is None or skip.policy != "extrapolate":
        return params
    layers, prompts = halting.layers, protocol == "continuation" or halting.rule == "quota"
    assert layers is not None
    dtype, rng = params["final_norm"]["norm"]["scale"].dtype, np.random.default_rng(seed)

    def numbers(*shape):
        return jax.numpy.asarray(rng.standard_normal(shape).astype(dtype) / 4)

    def some(count: int, of: int):
        return jax.numpy.asarray(np.sort(rng.permutation(of)[:count]))

    def light_layer(at: int) -> LightLayer:
        """Three heads or one, of groups of two: never alike; sizes differ by layer."""
        heads, neurons = some(3 - 2 * (at % 2), model.num_heads), some(7 + 4 * at, model.mlp_size)
        code = 9 - 4 * at
        encode = numbers(model.hidden_size + len(neurons) + 1, code)
        return LightLayer(heads, neurons, encode, numbers(code, model.hidden_size))

    neurons = ()
    if prompts:
        following = range(model.num_layers - layers[-1])
        neurons = tuple(some(11 - 5 * at, model.mlp_size) for at in following[:2])
    features = FEATURES if prompts else ("state", "embedding")
    read, code, first = (
        feature_count(features, model, neurons),
        9 if prompts else None,
        halting.light_from,
    )
    light = range(layers[0] - first + 1) if first else ()
    maps = KVMaps(
        maps_LXFO=numbers(model.num_layers, len(layers), code or read, 2 * model.kv_size),
        layers=layers,
        features=features,
        encode_XFR=numbers(len(layers), read, code) if code else None,
        neurons=neurons,
        light=tuple(map(light_layer, light)),
        light_from=first,
        attended_F=numbers(model.hidden_size + 1) if halting.light_share < 1 else None,
    )
    return params | {"kv_maps": maps}


def rounded(params: Any, quicksilver: QuickSilverConfig) -> Any:
    """The weights that int8 products stand for: rotated, 127 steps a side and output channel."""
    amq = quicksilver.amq
    if amq is None or amq.execution != "int8" or "linear" not in amq.targets:
        return params
    stacked = {name: dict(part) for name, part in params["layers"].items()}
    for part in stacked.values():
        if "kernel" in part:
            kernel = np.array(part["kernel"])
            turn = rotation(kernel.shape[1])
            deep = turn @ kernel[amq.layer :]
            step = np.abs(deep).max(1, keepdims=True) / 127
            kernel[amq.layer :] = turn.T @ (np.round(deep / step) * step)
            part["kernel"] = kernel
    return params | {"layers": stacked}


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
    dtype: str = "float64",
    atol: float = 1e-6,
    knife: float = 1e-9,
) -> Any:
    """The oracle's output, held against the masked engine's; None at a knife's edge."""
    model, params = a_model(kind, dtype)
    cfg = Config(model=model, quicksilver=quicksilver, protocol=protocol, engine="masked")
    tokens = rows_of(seed, repeats)
    with jax.enable_x64(dtype == "float64"):
        params = with_maps(params, model, quicksilver, protocol, seed)
        options: dict[str, Any] = {}
        if protocol == "continuation":
            options["prompt_lengths"] = PROMPTS
        if overrides is not None:
            options["overrides"] = TokenOverrides(**overrides)
        expected = oracle_score(rounded(params, quicksilver), tokens, cfg, **options)
        if expected.margin < knife:
            return None
        found = qs_jax.score(params, tokens, cfg, return_logits=True, **options)
    real = np.arange(WIDTH) < np.array(LENGTHS)[:, None]
    if found.record is not None:
        assert_same_record(found.record, expected, real, atol)
    np.testing.assert_allclose(found.logits[real], expected.logits[real], atol=atol)
    return expected


def assert_same_record(found: Any, expected: Any, real: np.ndarray, atol: float = 1e-6) -> None:
    """What is counted is equal at real positions; what is measured, where both have a number."""
    for name in COUNTED:
        one, other = getattr(found, name), getattr(expected, name)
        np.testing.assert_array_equal(one[..., real], other[..., real], err_msg=name)
    for name in MEASURED:
        one, other = getattr(found, name), getattr(expected, name)
        both = real & np.isfinite(one) & np.isfinite(other)
        np.testing.assert_allclose(one[both], other[both], atol=atol, err_msg=name)
