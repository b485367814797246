"""Text as tokens come, a piece at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what decoders give for bytes that are not (yet) a character


class Detokenizer:
    """Turns a growing row of token ids into text.

    A token's text depends on its neighbours (a leading space, a character of several tokens), so
    each piece is what a window of recent tokens decodes to now, beyond what it decoded to before;
    pieces that end inside a character wait for the rest. `push` for every token, then `flush`.

    Args:
      tokenizer: Decodes; special tokens are left out.
      prompt_ids: Tokens before the first new one; their text is not given again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int]) -> None:
        self._tokenizer: Any = tokenizer
        self._ids = list(prompt_ids)
        self._window = 0  # where the decoded window begins: never inside a character
        self._shown = len(self._ids)  # tokens whose text has been given

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain, often none or one word."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """The text held back, when no token follows."""
        text = self._new_text()
        self._window, self._shown = self._shown, len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._window : self._shown])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
