"""The modules of each Hugging Face `model_type`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn

from qs_jax.config import ModelConfig
from qs_jax.errors import ConfigError
from qs_jax.models import gpt2, layers, llama


@dataclasses.dataclass(frozen=True)
class Family:
    """The three modules a decoder is made of; each takes the `ModelConfig`.

    Attributes:
      embed: Token ids to states.
      block: One layer.
      final_norm: Before the head.
      rotates: Keys are rotated by their position (RoPE).
      mlp_products: Matrix products of width D x F in the MLP.
    """

    embed: type[nn.Module]
    block: type[layers.PreNormBlock]
    final_norm: Callable[[ModelConfig], nn.Module]
    rotates: bool
    mlp_products: int


_layer_norm = functools.partial(layers.FinalNorm, make_norm=layers.layer_norm)
_rms_norm = functools.partial(layers.FinalNorm, make_norm=layers.rms_norm)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(gpt2.Embed, gpt2.Block, _layer_norm, rotates=False, mlp_products=2),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3"),
        Family(llama.Embed, llama.Block, _rms_norm, rotates=True, mlp_products=3),
    ),
}


def family_of(model: ModelConfig) -> Family:
    """The modules of `model`; an unknown `model_type` is refused."""
    if model.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"model_type {model.model_type!r} is not supported; known: {known}.")
    return FAMILIES[model.model_type]
