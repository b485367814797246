"""GGUF files as llama.cpp's converter writes them, from Hugging Face tensors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row by row, from the definition: new row 2i + s of a head is old row s * H/2 + i."""
    out, width = np.empty_like(rows), len(rows) // heads
    for head in range(heads):
        for i in range(width // 2):
            for half in range(2):
                out[head * width + 2 * i + half] = rows[head * width + half * width // 2 + i]
    return out


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    *,
    quantization: str = "F32",
    tokenizer: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
    leave_out: Sequence[str] = (),
) -> Path:
    """Write tensors under Hugging Face names as a GGUF file; norms stay F32.

    `tokenizer` is metadata below `tokenizer.ggml.`, `extra` is metadata by full name, written
    after that in `leave_out` is dropped.
    """
    import gguf

    kind = config["model_type"]
    writer = gguf.GGUFWriter(path, kind)
    layers = config["n_layer" if kind == "gpt2" else "num_hidden_layers"]
    writer.add_block_count(layers)
    if kind == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    if kind == "llama":
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    for name in leave_out:
        writer.kv_data[0].pop(name, None)
    prefixed = {f"tokenizer.ggml.{key}": value for key, value in (tokenizer or {}).items()}
    for key, value in (prefixed | (extra or {})).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    dtype = gguf.GGMLQuantizationType[quantization]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], layers)
    for name, tensor in tensors.items():
        if kind == "llama" and "q_proj" in name:
            tensor = interleave(tensor, config["num_attention_heads"])
        elif kind == "llama" and "k_proj" in name:
            tensor = interleave(tensor, config["num_key_value_heads"])
        elif kind == "gpt2" and ".c_" in name:
            tensor = tensor.T
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if tensor.ndim == 1 or quantization == "F32":
            writer.add_tensor(gguf_name, np.ascontiguousarray(tensor, np.float32))
        else:
            data = gguf.quants.quantize(np.ascontiguousarray(tensor, np.float32), dtype)
            writer.add_tensor(gguf_name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small_vocab(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tiny model with a vocabulary wide enough for bytes."""
    rng = np.random.default_rng(0)
    wide = {
        name: rng.normal(size=(300, 32)).astype(np.float32)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    return tensors | wide


def byte_level_tokenizer(**changes: Any) -> dict[str, Any]:
    """A real BPE over bytes, with a few merges of English."""
    from tokenizers import pre_tokenizers

    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = ["t h", "th e", "Ġ the", "i n", "1 2"]
    tokens += [merge.replace(" ", "") for merge in merges]
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3] + [1] * (len(tokens) - 1),
        "merges": merges,
        "bos_token_id": 0,
        "eos_token_id": 0,
    } | changes


def sentencepiece_tokenizer() -> dict[str, Any]:
    """Metadata of a SentencePiece BPE with byte fallback and a few pieces of English."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the"]
    return {
        "model": "llama",
        "tokens": pieces + words,
        "scores": [0.0] * len(pieces) + [-7.0, -8.0, -9.0, -10.0, -2.0, -3.0, -1.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
