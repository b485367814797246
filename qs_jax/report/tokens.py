"""Tokens as a reader should see them: text where they are text, bytes where they are not."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Shown as code points: control, format (bidirectional marks, joiners), separators, surrogates,
# private and unassigned characters. They are invisible, or change how what follows is laid out.
_UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}
_SIGNS = {"\n": "⏎\n", "\t": "⇥\t", "\r": "␍"}


def labels(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What to write for each token of a row.

    A token that is a part of a character is its bytes, as in ⟨E2 9D⟩; the last part has the
    character behind them. Line ends and tabs get a sign, other invisible characters are ⟨U+200D⟩.
    """
    backend, table = getattr(tokenizer, "backend_tokenizer", None), {}
    if backend is not None and "ByteLevel" in repr(backend.decoder):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        table = {character: byte for byte, character in bytes_to_unicode().items()}
    pieces = [_piece(tokenizer, int(token), table) for token in ids]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown = []
    for piece, following in zip(pieces, [*pieces[1:], ""], strict=True):
        if isinstance(piece, str):
            shown.append(visible(piece))
            continue
        waiting = bool(decoder.getstate()[0])
        text = decoder.decode(piece, final=isinstance(following, str))
        if waiting or "\ufffd" in text:
            shown.append(_bytes(piece) + visible(text.replace("\ufffd", "")))
        else:
            shown.append(visible(text) + _bytes(piece[len(text.encode()) :]))
    return shown


def visible(text: str) -> str:
    """Text with a sign or a code point for every character that shows nothing."""

    def show(character: str) -> str:
        unseen = unicodedata.category(character) in _UNSEEN
        return _SIGNS.get(character, f"⟨U+{ord(character):04X}⟩" if unseen else character)

    return "".join(map(show, text))


def _bytes(piece: bytes) -> str:
    return f"⟨{piece.hex(' ').upper()}⟩" if piece else ""


def _piece(tokenizer: Any, token: int, table: dict[str, int]) -> str | bytes:
    """The bytes of a token; its text where the tokenizer works on text."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:
        return f"⟨{token}⟩"
    if token in tokenizer.all_special_ids:
        return str(name)
    if match := _BYTE.fullmatch(name):
        return bytes([int(match[1], 16)])
    if table and all(character in table for character in name):
        return bytes(table[character] for character in name)
    # SentencePiece marks a leading space; a token decoded alone would lose it.
    return name.replace("▁", " ") if "▁" in name else str(tokenizer.decode([token]))
