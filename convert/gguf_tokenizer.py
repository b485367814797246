"""Tokenizers of GGUF files, rebuilt from their metadata.

Where a file leaves something out, the default of the GGUF specification or of llama.cpp holds and
is noted, or the file is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from convert.errors import ConversionError
from qs_jax.checkpoint import transformers

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# GGUF token types.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# How Llama 3 cuts text before merging (its published tokenizer.json).
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How llama.cpp cuts text where the file does not say: one rule after the other.
_DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
# How Qwen2 and Qwen3 cut it: as Llama 3, but each digit alone (their published tokenizer.json).
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# llama.cpp's own for SentencePiece files that name none.
SENTENCEPIECE_IDS = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build_tokenizer(
    value: Callable[..., Any], rows: int
) -> tuple[PreTrainedTokenizerFast, list[str]]:
    """Rebuild the tokenizer of a GGUF file, from `value(name, default)` of its metadata.

    There are two kinds: `gpt2` (byte-level BPE with a named pre-tokenizer) and `llama`
    (SentencePiece BPE with scores and byte fallback). `rows` is the size of the model's vocabulary.
    Also returns notes for the user.
    """
    from tokenizers import AddedToken

    kind, tokens = value("tokenizer.ggml.model"), value("tokenizer.ggml.tokens")
    if kind is None or tokens is None:
        raise ConversionError("the file has no tokenizer; --no-tokenizer works with token ids.")
    if kind not in ("gpt2", "llama"):
        raise ConversionError(f"tokenizer {kind!r} is not implemented (known: gpt2, llama).")
    notes: list[str] = []
    # llama.cpp names empty tokens so.
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    types = _types(value, tokens, notes)
    if len(tokens) < rows:
        notes.append(f"the model has {rows} ids, the tokenizer {len(tokens)}: the rest has no text")
    ids = _special_ids(value, kind, notes)
    tokenizer = (_byte_level if kind == "gpt2" else _sentencepiece)(value, tokens, ids, notes)
    for token, which in zip(tokens, types, strict=True):
        if which in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special = which != _USER_DEFINED
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    named = {
        name: tokens[ids[key]]
        for name, key in _SPECIAL.items()
        if key in ids and 0 <= ids[key] < len(tokens)
    }
    _add_template(tokenizer, value, named, kind)
    fast = transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=value(f"{value('general.architecture')}.context_length"),
        **named,
    )
    return fast, notes


def _types(value: Callable[..., Any], tokens: list[str], notes: list[str]) -> list[int]:
    """The type of each token; refuses lists that do not fit and tokens that stand there twice."""
    if len(set(tokens)) < len(tokens):
        twice = next(token for token, times in Counter(tokens).items() if times > 1)
        raise ConversionError(f"tokenizer.ggml.tokens holds {twice!r} more than once.")
    for name in ("token_type", "scores"):
        given = value(f"tokenizer.ggml.{name}")
        if given is not None and len(given) != len(tokens):
            sizes = f"has {len(given)} entries for {len(tokens)} tokens"
            raise ConversionError(f"tokenizer.ggml.{name} {sizes}.")
    if (types := value("tokenizer.ggml.token_type")) is None:
        notes.append("tokenizer.ggml.token_type is missing; all tokens are taken as normal")
        return [_NORMAL] * len(tokens)
    return types


def _special_ids(value: Callable[..., Any], kind: str, notes: list[str]) -> dict[str, int]:
    """Ids of the special tokens by their GGUF names."""
    ids = {key: value(f"tokenizer.ggml.{key}") for key in _SPECIAL.values()}
    for key, default in (SENTENCEPIECE_IDS if kind == "llama" else {}).items():
        if ids[key] is None:
            ids[key] = default
            notes.append(f"tokenizer.ggml.{key} is missing; {default} is taken, as in llama.cpp")
    if ids["eos_token_id"] is None:
        notes.append("tokenizer.ggml.eos_token_id is missing: no token ends a text")
    return {key: index for key, index in ids.items() if index is not None}


def _byte_level(
    value: Callable[..., Any], tokens: list[str], ids: dict[str, int], notes: list[str]
) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = value("tokenizer.ggml.pre")
    if not name:
        notes.append(
            "tokenizer.ggml.pre is missing: the file does not say how text is cut. llama.cpp's "
            "'default' pre-tokenizer is taken; expect worse text than from a newer file"
        )
        name = "default"

    def splits(*rules: str) -> list[Any]:
        cuts = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in rules]
        return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = {
        "default": splits(*_DEFAULT_SPLITS),
        "gpt-2": [byte_level],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "llama-bpe": splits(_LLAMA3_SPLIT),
        "qwen2": splits(_QWEN2_SPLIT),
    }
    if name not in known:
        names = ", ".join(known)
        raise ConversionError(f"pre-tokenizer {name!r} is not implemented (known: {names}).")
    if (merges := value("tokenizer.ggml.merges")) is None:
        raise ConversionError("tokenizer.ggml.merges is missing: nothing says what is one token.")
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs: list[Any] = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(known[name])
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    value: Callable[..., Any], tokens: list[str], ids: dict[str, int], notes: list[str]
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tokens)}
    scores = value("tokenizer.ggml.scores")
    if scores is None or len(set(scores)) < 2 or not all(map(math.isfinite, scores)):
        what = "missing" if scores is None else "the same for all tokens, or not finite"
        raise ConversionError(f"tokenizer.ggml.scores is {what}: nothing says what is one token.")
    merges = _merges_of_scores(tokens, scores)
    unk: dict[str, Any] = {"unk_token": tokens[ids["unknown_token_id"]]}
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
