"""Hugging Face models on tiny random configs, and the way from them to ours."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from convert.hf_to_flax import convert
from qs_jax import load
from qs_jax.config import ModelConfig
from qs_jax.models import Params

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GPT2 = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# Compiler options of tests that read a compiled program: the default suite compiles with few.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **settings}}


# Add a row here and it climbs the whole ladder, both protocols of the cache, and the round trip.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-inner-gelu": ("gpt2", {"n_inner": 40, "activation_function": "gelu"}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "rope-linear": ("llama", rope("linear", factor=4.0)),
    "rope-dynamic": ("llama", rope("dynamic", factor=4.0)),
    "rope-llama3": (
        "llama",
        rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "rope-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "rope-yarn-all": (
        "llama",
        rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.7,
            mscale_all_dim=0.4,
            truncate=False,
        ),
    ),
}


def hf_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 Hugging Face model whose logits are of order 10."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = GPT2 if kind == "gpt2" else LLAMA
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | changes)))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or "ln_" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif tensor.ndim == 1:
                tensor.copy_(0.2 * torch.randn_like(tensor))
            else:
                tensor.copy_(torch.randn_like(tensor) * (tensor.shape[-1] ** -0.5))
        model.get_output_embeddings().weight.mul_(8.0)
    return model.eval()


@dataclasses.dataclass
class Pair:
    """The same weights as a torch model and as ours."""

    hf: Any
    params: Params
    model: ModelConfig
    hf_folder: Path
    folder: Path


def make_pair(case: str, folder: Path) -> Pair:
    kind, changes = CASES[case]
    hf = hf_model(kind, **changes)
    hf.save_pretrained(folder / "hf")
    convert(str(folder / "hf"), folder / "ours", tokenizer=False)
    params, model = load(folder / "ours")
    return Pair(hf, params, model, folder / "hf", folder / "ours")


def random_tokens(model: ModelConfig, batch: int = 2, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, model.vocab_size, (batch, width), np.int32)


def row_of(model: ModelConfig, width: int) -> list[int]:
    """A row of random ids that is the same for every caller."""
    return random_tokens(model, 1, width, seed=width)[0].tolist()
