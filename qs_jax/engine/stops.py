"""Stop strings, as a table that a program follows from token to token.

The strings are patterns over bytes (Aho & Corasick 1975): a state says which beginnings of them the
text ends with. Tokens are sequences of bytes, so a state and a token give the next state, and a
string is found wherever tokens cut it.
"""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from qs_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def stop_tokens(tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]) -> list[int]:
    """Ids of the stop strings that are single added tokens, whose text decoding leaves out."""
    added = tokenizer.get_added_vocab()
    return sorted(added[each] for each in stop if each in added)


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text before the first stop string."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def held_back(text: str, stop: tuple[str, ...]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    longest = min(max(map(len, stop), default=1) - 1, len(text))
    ends = (size for size in range(longest, 0, -1) if any(s.startswith(text[-size:]) for s in stop))
    return next(ends, 0)


# States come in multiples of this; nothing reaches the spare ones.
ROOM = 16


@functools.lru_cache(maxsize=8)
def stop_table(
    tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...], vocab_size: int
) -> Int[np.ndarray, "X V"]:
    """The state after each state and token. The text begins in state 0; the last state is the end.

    X is a multiple of 16, so that strings of near sizes share a program.

    Args:
      tokenizer: Of the model; its special tokens have no text.
      stop: Strings, none empty.
      vocab_size: V; ids beyond the tokenizer's have no text.
    """
    next_XB = _automaton([each.encode() for each in stop])
    tokens = token_bytes(tokenizer, vocab_size)
    lengths_V = np.array([len(token) for token in tokens])
    bytes_V = np.array(tokens, f"S{max(lengths_V.max(initial=0), 1)}")
    table_XV = np.repeat(np.arange(len(next_XB))[:, None], vocab_size, axis=1)
    codes_VM = bytes_V.view(np.uint8).reshape(vocab_size, -1)
    for at in range(codes_VM.shape[1]):
        (longer,) = np.nonzero(lengths_V > at)
        table_XV[:, longer] = next_XB[table_XV[:, longer], codes_VM[longer, at][None]]
    return table_XV.astype(np.int32)


def _automaton(patterns: list[bytes]) -> Int[np.ndarray, "X 256"]:
    """The state after each state and byte; the last state, in which a pattern was met, stays."""
    prefixes = sorted({p[:size] for p in patterns for size in range(len(p))}, key=len)
    number = {prefix: state for state, prefix in enumerate(prefixes)}
    states = -(-(len(prefixes) + 1) // ROOM) * ROOM
    next_XB = np.full((states, 256), states - 1, np.int64)
    for prefix, state in number.items():
        for byte in range(256):
            seen = prefix + bytes([byte])
            if any(seen.endswith(pattern) for pattern in patterns):
                continue
            tails = (seen[start:] for start in range(len(seen) + 1))
            next_XB[state, byte] = next(number[tail] for tail in tails if tail in number)
    return next_XB


@functools.lru_cache(maxsize=8)
def token_bytes(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[bytes]:
    """What each token adds to a text, by the tokenizer's decoder.

    Raises:
      InputError: The decoder is of a kind whose tokens are not pieces of text.
    """
    backend = tokenizer.backend_tokenizer
    steps = _steps(json.loads(backend.to_str())["decoder"])
    kinds = {step["type"] for step in steps}
    unknown = kinds - {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    unknown |= {"Replace by Regex" for step in steps if "Regex" in step.get("pattern", ())}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise InputError(f"stop strings need to know a token's text: decoder {names}.")
    if "ByteLevel" in kinds:
        of_character = {character: byte for byte, character in _characters_of_bytes().items()}
    added, special = tokenizer.get_added_vocab(), set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found = [b""] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        if index >= vocab_size or index in special:
            continue
        if not kinds:  # such tokens are joined by spaces
            found[index] = f" {token}".encode()
        elif token in added:
            found[index] = token.encode()
        elif "ByteLevel" in kinds:
            found[index] = bytes(of_character[c] for c in token if c in of_character)
        elif "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-F]{2}>", token):
            found[index] = bytes([int(token[3:5], 16)])
        else:
            found[index] = _replaced(token, steps).encode()
    return found


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    inner = decoder.get("decoders")
    return [decoder] if inner is None else [step for each in inner for step in _steps(each)]


def _replaced(token: str, steps: list[dict[str, Any]]) -> str:
    """A token of SentencePiece with its mark for a space read."""
    for step in steps:
        if step["type"] == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif step["type"] == "Metaspace":
            token = token.replace(step["replacement"], " ")
    return token


def _characters_of_bytes() -> dict[int, str]:
    """How byte-level tokenizers write each byte (Radford et al. 2019).

    Itself where it is visible, else the next character from 256 on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {byte: chr(byte) for byte in visible}
    return table | {byte: chr(256 + place) for place, byte in enumerate(hidden)}
