"""Prompts as tokens, and new tokens as text while they are generated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qs_jax.config import Config
from qs_jax.engine.generate import stream
from qs_jax.errors import InputError
from qs_jax.models import Params
from qs_jax.timing import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"  # what decoders give for bytes that are not (yet) a character


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
) -> list[int]:
    """Token ids of a prompt, in the model's chat template if asked for.

    Raises:
      InputError: The prompt is empty, or there is no chat template.
    """
    if not prompt:
        raise InputError("the prompt is empty.")
    try:
        (prompt + (system or "")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid UTF-8.") from error
    if system is not None and not chat:
        raise InputError("--system needs --chat.")
    if not chat:
        ids = tokenizer(prompt).input_ids
    elif tokenizer.chat_template is None:
        raise InputError("this checkpoint has no chat template; leave out --chat.")
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise what they like
            raise InputError(f"the chat template refused these messages: {error}") from error
        ids = tokenizer(str(text), add_special_tokens=False).input_ids
    if not ids:
        raise InputError("the prompt has no tokens.")
    return list(ids)


class TextStream:
    """Text of one row as it is generated, and how long it took.

    Attributes:
      texts: Iterator over pieces of text; timings are complete when it ends.
      prompt_tokens: Tokens of the prompt.
      new_tokens: Tokens produced so far.
    """

    def __init__(
        self, params: Params, tokenizer: PreTrainedTokenizerBase, ids: list[int], cfg: Config
    ) -> None:
        self.prompt_tokens, self.new_tokens = len(ids), 0
        self.prefill, self.decode = Stopwatch(), Stopwatch()
        self._steps = stream(params, [ids], cfg)  # checks the input at once
        self._detokenizer = Detokenizer(tokenizer, ids)
        self.texts = self._texts()

    def _texts(self) -> Iterator[str]:
        watch = self.prefill
        while True:
            with watch:
                step = next(self._steps, None)
            if step is None:
                break
            watch = self.decode
            self.new_tokens += 1
            if text := self._detokenizer.push(int(step.tokens[0])):
                yield text
        if text := self._detokenizer.flush():
            yield text

    def summary(self) -> str:
        """One line: tokens per second of prefill and decode, and what was compiled."""
        watches = (self.prefill, self.decode)
        seconds, compiled, cached = (
            sum(getattr(watch, name) for watch in watches)
            for name in ("compile", "compiled", "cached")
        )
        parts = [
            f"prefill {self.prompt_tokens} tokens in {self.prefill.run:.2f} s "
            f"({self.prefill_rate:.0f} tokens/s)",
            f"decode {self.new_tokens - 1} tokens in {self.decode.run:.2f} s "
            f"({self.decode_rate:.1f} tokens/s)",
            f"compiling {compiled} programs, {cached} from the cache: {seconds:.1f} s",
        ]
        return f"[{' · '.join(parts if self.new_tokens > 1 else parts[::2])}]"

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second; the first new token comes with them."""
        return self.prompt_tokens / max(self.prefill.run, 1e-9)

    @property
    def decode_rate(self) -> float:
        """New tokens a second, the first one not counted."""
        return (self.new_tokens - 1) / max(self.decode.run, 1e-9)


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
