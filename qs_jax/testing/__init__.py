"""Tiny random models and a toy tokenizer, for tests without a download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from qs_jax.checkpoint import transformers
from qs_jax.config import ModelConfig
from qs_jax.models import Params, init_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["tiny_model", "tiny_params", "toy_tokenizer"]

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "num_layers": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "mlp_size": 48,
    "max_positions": 128,
    "norm_eps": 1e-5,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "gpt2": {
        "activation": "gelu_new",
        "tie_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama": {
        "num_kv_heads": 2,
        "activation": "silu",
        "tie_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 10000.0,
    },
}


def tiny_model(model_type: str = "llama", **changes: Any) -> ModelConfig:
    """A model of about 50,000 parameters.

    Args:
      model_type: "gpt2" or "llama".
      **changes: Fields of `ModelConfig` to set.
    """
    fields: dict[str, Any] = {"model_type": model_type} | _COMMON | _FAMILY[model_type] | changes
    return ModelConfig(**fields)


def tiny_params(model: ModelConfig, seed: int = 0, scale: float = 8.0) -> Params:
    """Random parameters, with embeddings large enough that predictions differ clearly.

    Args:
      model: Architecture.
      seed: Of the generator.
      scale: Factor on the embedding and head tables.
    """
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed))
    for part in ("embed", "head"):
        if part in params:
            params[part] = jax.tree.map(lambda leaf: leaf * scale, params[part])
    return params


def toy_tokenizer(
    folder: str | Path | None = None, vocab_size: int = 97
) -> PreTrainedTokenizerFast:
    """A tokenizer of single printable ASCII characters, with `<s>` and `</s>`.

    Args:
      folder: Save it there too, as a Hugging Face folder would have it.
      vocab_size: Number of ids; at most 97.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)]
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *characters][:vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="</s>"
    )
    if folder is not None:
        fast.save_pretrained(str(folder))
    return fast
