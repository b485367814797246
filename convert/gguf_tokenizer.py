"""A tokenizer rebuilt from GGUF metadata alone, with the `tokenizers` library.

Two kinds exist in Llama-architecture files: `gpt2` (byte-level BPE with a named pre-tokenizer) and
`llama` (SentencePiece BPE with scores and byte fallback).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from convert.errors import ConversionError
from qs_jax.hf import transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

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


def build_tokenizer(value: Callable[..., Any], description: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file.

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
