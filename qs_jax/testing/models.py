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


def tiny_model(model_type: str = "llama", **changes: Any) -> ModelConfig:
    """A model of about 50,000 parameters of any family, with `changes` to the fields."""
    gpt2 = model_type == "gpt2"
    fields: dict[str, Any] = {"attention_bias": gpt2, "mlp_bias": gpt2, "tie_embeddings": gpt2}
    fields |= {"vocab_size": 97, "num_layers": 3, "hidden_size": 32, "num_heads": 4, "head_dim": 8}
    fields |= {"num_kv_heads": 4 if gpt2 else 2, "mlp_size": 48, "max_positions": 128}
    fields |= {"norm_eps": 1e-5, "activation": "gelu_new" if gpt2 else "silu"}
    fields["rope_theta"] = None if gpt2 else 1e4
    families: dict[str, dict[str, Any]] = {
        "mistral": {"sliding_window": 7},
        "qwen2": {"qkv_bias": True},
        "qwen3": {"qk_norm": True, "head_dim": 16},
    }
    fields |= families.get(model_type, {})
    return ModelConfig(model_type, **(fields | changes))


def tiny_params(model: ModelConfig, seed: int = 0, scale: float = 8.0) -> Params:
    """Random parameters; embeddings and head times `scale`, so that predictions differ clearly."""
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed))
    tables = {part: params[part] for part in ("embed", "head") if part in params}
    return params | jax.tree.map(lambda leaf: leaf * scale, tables)


def toy_tokenizer(
    folder: str | Path | None = None, vocab_size: int = 97
) -> PreTrainedTokenizerFast:
    """A tokenizer of up to 97 single ASCII characters, `<s>` and `</s>`; also saved in `folder`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = ["<s>", "</s>", *map(chr, range(32, 127))]
    vocab = {token: index for index, token in enumerate(characters[:vocab_size])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="</s>"
    )
    if folder is not None:
        fast.save_pretrained(str(folder))
    return fast
