"""The models of a run, their prompts, and the calls that are timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import qs_jax
from examples.text import LIGHTHOUSE
from qs_jax import presets
from qs_jax.config import (
    GREEDY,
    Config,
    HaltingConfig,
    KVSkipConfig,
    ModelConfig,
    QuickSilverConfig,
)
from qs_jax.mechanisms.kv_maps import FEATURES, KVMaps, feature_count
from qs_jax.mechanisms.light import LightLayer
from qs_jax.models import Params, abstract_params
from qs_jax.testing import tiny_model

LLAMA_7B = ModelConfig(
    "llama",
    vocab_size=32_000,
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_size=11_008,
    max_positions=16_384,
    norm_eps=1e-5,
    activation="silu",
    tie_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    rope_theta=1e4,
    dtype="bfloat16",
)
_SCALE = 0.02  # of random weights


class Sizes(NamedTuple):
    """How large a run is.

    Attributes:
      prompts: Rows, and tokens of each row.
      new_tokens: Tokens that each row continues by.
      parity: Tokens whose logits are compared; the last `new_tokens` are scored under a preset.
      rounds: Runs of each row.
      large: The model with random weights.
    """

    prompts: tuple[tuple[int, int], ...]
    new_tokens: int
    parity: int
    rounds: int
    large: ModelConfig


FULL = Sizes(((1, 2048), (8, 2048), (8, 8192)), 64, 384, 6, LLAMA_7B)
# As the random checkpoint of the tests, so that its programs are compiled once.
_TINY_MODEL = tiny_model(dtype="bfloat16", bos_token_id=0, eos_token_ids=(1,))
TINY = Sizes(((2, 64),), 8, 64, 2, _TINY_MODEL)


class Subject(NamedTuple):
    """A model whose parameters are made when they are first asked for.

    Attributes:
      model: In the dtype that is timed.
      params: Returns its parameters.
      calls: What is timed, by name.
    """

    model: ModelConfig
    params: Callable[[], Params]
    calls: dict[str, Config]


def passage(ckpt: Path) -> np.ndarray:
    """Token ids of a text of about 400 tokens."""
    return np.array(qs_jax.load_tokenizer(ckpt)(LIGHTHOUSE).input_ids, np.int32)


def repeated(ids: np.ndarray, batch: int, length: int, vocab_size: int) -> np.ndarray:
    """Prompts `[batch, length]` that repeat a passage, each from another place on."""
    rows = [np.resize(np.roll(ids, -37 * row), length) for row in range(batch)]
    return np.stack(rows) % np.int32(vocab_size)


def embedded(ckpt: Path, new_tokens: int) -> Subject:
    """The checkpoint in bfloat16: dense, `balanced`, and `balanced` with drafts."""
    params, model = qs_jax.load(ckpt, dtype="bfloat16")
    return Subject(model, lambda: params, _calls(model, new_tokens))


def large(model: ModelConfig, new_tokens: int) -> Subject:
    """Random weights: the same calls, and light layers in the embedded preset's proportions."""
    light = light_settings(model)
    calls = _calls(model, new_tokens)
    calls["light"] = calls["dense"].replace(quicksilver=light)

    @functools.cache
    def params() -> Params:
        return random_params(model) | {"kv_maps": random_maps(model, light)}

    return Subject(model, params, calls)


def _calls(model: ModelConfig, new_tokens: int) -> dict[str, Config]:
    settings = {"max_new_tokens": new_tokens, "eos_token_ids": (), **GREEDY}
    named = {name: presets.config(name, model, **settings) for name in ("balanced", "fast-answers")}
    return {"dense": Config(model, **settings)} | named


def mechanism(cfg: Config) -> dict[str, Any] | None:
    """What a call leaves out, in a few words and numbers; None of a dense one."""
    qs = cfg.quicksilver
    if qs is None or qs.halting is None:
        return None
    halting, skip = qs.halting, qs.kv_skip
    return {
        "kind": "quota" if halting.light_from is None else "light layers",
        "layers": list(halting.layers or ()),
        "quota": list(halting.quota),
        "light_from": halting.light_from,
        "kv_policy": None if skip is None else skip.policy,
        "drafts": cfg.speculate is not None,
    }


# --- random weights -----------------------------------------------------------------------------


def random_params(model: ModelConfig, seed: int = 0) -> Params:
    """Random parameters in the model's dtype, made where they are used, one layer at a time."""
    shapes, key, leaves = abstract_params(model), jax.random.key(seed), []
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(shapes)):
        if jax.tree_util.keystr(path, simple=True).endswith("scale"):
            leaves.append(jnp.ones(leaf.shape, leaf.dtype))
        else:
            leaves.append(_noise(jax.random.fold_in(key, index), leaf.shape, leaf.dtype))
    # Bound to a device, as those of a checkpoint are: the programs are the same then.
    return jax.device_put(jax.tree.unflatten(jax.tree.structure(shapes), leaves), jax.devices()[0])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _noise(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    def part(key: jax.Array) -> jax.Array:
        return _SCALE * jax.random.normal(key, shape[1:], dtype)

    return jax.lax.map(part, jax.random.split(key, shape[0]))


def light_settings(model: ModelConfig) -> QuickSilverConfig:
    """Light layers from the middle on and a stop at 0.8 of the depth, as the embedded `balanced`.

    Its light layers keep, on average, a third of the heads and a sixth of the neurons, and its
    codes have a third of the width: so do those of `random_maps`.
    """
    first, stop = (max(round(share * model.num_layers), 2) for share in (16 / 30, 24 / 30))
    halting = HaltingConfig(
        rule="quota",
        layers=(stop,),
        quota=(1.0,),
        light_from=first,
        light_share=0.8,
        entropy=None,
    )
    return QuickSilverConfig(halting, KVSkipConfig("extrapolate"))


def _even(size: float) -> int:
    """A multiple of 8, as fitted sizes are."""
    return max(round(size / 8), 1) * 8


def random_maps(model: ModelConfig, qs: QuickSilverConfig, seed: int = 1) -> KVMaps:
    """Random light layers and maps of the sizes that `light_settings` names."""
    assert qs.halting is not None
    assert qs.halting.layers
    assert qs.halting.light_from
    (stop,), first, keys = qs.halting.layers, qs.halting.light_from, jax.random.key(seed)
    heads, kept, code = (
        model.num_heads // 3,
        _even(model.mlp_size / 6),
        _even(model.hidden_size / 3),
    )
    neurons = (jnp.arange(_even(model.mlp_size / 48)),) * max(model.num_layers - stop - 1, 1)

    def numbers(at: int, *shape: int) -> jax.Array:
        return _noise(jax.random.fold_in(keys, at), shape, model.dtype)

    def light_layer(at: int) -> LightLayer:
        encode = numbers(2 * at, model.hidden_size + kept + 1, code)
        decode = numbers(2 * at + 1, code, model.hidden_size)
        return LightLayer(jnp.arange(heads), jnp.arange(kept), encode, decode)

    read = feature_count(FEATURES, model, neurons)
    return KVMaps(
        maps_LXFO=numbers(1000, model.num_layers, 1, code, 2 * model.kv_size),
        layers=(stop,),
        features=FEATURES,
        encode_XFR=numbers(1001, 1, read, code),
        neurons=neurons,
        light=tuple(map(light_layer, range(stop - first + 1))),
        light_from=first,
        attended_F=numbers(1002, model.hidden_size + 1),
    )
