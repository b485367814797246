"""Published checkpoints, as their config.json describes them, have the tensors of Hugging Face."""

from typing import Any

import pytest

from convert.errors import Problems
from convert.hf_config import model_config
from convert.mapping import full_name, rules_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.hf

_LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
_COMMON |= {"attention_dropout": 0.0, "torch_dtype": "bfloat16"}


def _config(kind: str, sizes: str, **more: Any) -> dict[str, Any]:
    """A config of layers, width, heads, KV heads, MLP width, positions and vocabulary."""
    names = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads".split()
    names += "intermediate_size max_position_embeddings vocab_size".split()
    read = dict(zip(names, map(int, sizes.split()), strict=True))
    return _COMMON | {"model_type": kind, "rms_norm_eps": 1e-6} | read | more


def _gpt2(sizes: str, **more: Any) -> dict[str, Any]:
    names = "n_layer n_embd n_head n_positions vocab_size".split()
    read = dict(zip(names, map(int, sizes.split()), strict=True))
    common = {"model_type": "gpt2", "activation_function": "gelu_new", "n_ctx": 1024}
    common |= {"layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1, "summary_type": "cls_index"}
    return common | read | {"bos_token_id": 50256, "eos_token_id": 50256} | more


_QWEN = {"use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151645}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": _config(
        "llama",
        "32 4096 32 32 11008 4096 32000",
        rms_norm_eps=1e-5,
        pretraining_tp=1,
        rope_scaling=None,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Llama-3.1-8B-Instruct": _config(
        "llama",
        "32 4096 32 8 14336 131072 128256",
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    "Llama-3.2-1B": _config(
        "llama",
        "16 2048 32 8 8192 131072 128256",
        rms_norm_eps=1e-5,
        head_dim=64,
        rope_theta=500000.0,
        rope_scaling=_LLAMA3 | {"factor": 32.0},
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
    "Mistral-7B-v0.1": _config(
        "mistral",
        "32 4096 32 8 14336 32768 32000",
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        sliding_window=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "Mistral-7B-Instruct-v0.3": _config(
        "mistral",
        "32 4096 32 8 14336 32768 32768",
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
    ),
    "Mistral-Nemo-Instruct-2407": _config(
        "mistral",
        "40 5120 32 8 14336 131072 131072",
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        sliding_window=None,
    ),
    "Qwen2.5-0.5B-Instruct": _config(
        "qwen2",
        "24 896 14 2 4864 32768 151936",
        rope_theta=1000000.0,
        max_window_layers=21,
        sliding_window=32768,
        tie_word_embeddings=True,
        **_QWEN,
    ),
    "Qwen2-7B": _config(
        "qwen2",
        "28 3584 28 4 18944 131072 152064",
        rope_theta=1000000.0,
        max_window_layers=28,
        sliding_window=131072,
        tie_word_embeddings=False,
        **_QWEN,
    ),
    "Qwen3-0.6B": _config(
        "qwen3",
        "28 1024 16 8 3072 40960 151936",
        head_dim=128,
        attention_bias=False,
        rope_theta=1000000,
        rope_scaling=None,
        max_window_layers=28,
        sliding_window=None,
        tie_word_embeddings=True,
        **_QWEN,
    ),
    "gpt2-large": _gpt2("36 1280 20 1024 50257", attn_pdrop=0.1, embd_pdrop=0.1),
    "distilgpt2": _gpt2("6 768 12 1024 50257", _num_labels=1, id2label={"0": "LABEL_0"}),
    "DialoGPT-medium": _gpt2(
        "24 1024 16 1024 50257", task_specific_params={"conversational": {"max_length": 1000}}
    ),
    "Cerebras-GPT-111M": _gpt2(
        "10 768 12 2048 50257",
        activation_function="gelu",
        n_inner=3072,
        n_ctx=...,
        scale_attn_weights=True,
        use_cache=True,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_are_those_of_hugging_face(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    raw, problems = {k: v for k, v in PUBLISHED[name].items() if v is not ...}, Problems()
    model, notes = model_config(raw, "bfloat16", problems, {})
    assert not any(problems.values())
    assert model is not None
    assert notes == []
    config = AutoConfig.for_model(**raw)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config).state_dict()
    expected = {key: tuple(value.shape) for key, value in theirs.items()}
    if model.tie_embeddings:
        del expected["lm_head.weight"]
    ours = {
        full_name(key, model): rule.shape
        for rule in rules_of(model)
        for key in rule.names(model.num_layers)
    }
    assert ours == expected
    assert model.sliding_window == getattr(config, "sliding_window", None)
    assert model.num_kv_heads == getattr(config, "num_key_value_heads", model.num_heads)
    if model.rope_theta is not None:
        assert model.rope_theta == config.rope_parameters["rope_theta"]
    ends = raw.get("eos_token_id", ())
    assert model.eos_token_ids == (tuple(ends) if isinstance(ends, list | tuple) else (ends,))
