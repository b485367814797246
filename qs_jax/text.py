"""Prompts as tokens, and new tokens as text while they are generated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from qs_jax.config import Config
from qs_jax.engine.generate import stream
from qs_jax.engine.prompt_cache import PromptCache
from qs_jax.engine.stops import cut, held_back
from qs_jax.errors import InputError
from qs_jax.models import Params
from qs_jax.timing import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    chat: bool = False,
    system: str | None = None,
) -> list[int]:
    """Token ids of a prompt, in the model's chat template if asked for."""
    if not prompt:
        raise InputError("the prompt is empty.")
    try:
        (prompt + (system or "")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not valid UTF-8.") from error
    if system is not None and not chat:
        raise InputError("--system needs --chat.")
    if chat:
        if tokenizer.chat_template is None:
            raise InputError("this checkpoint has no chat template; leave out --chat.")
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        try:
            text = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise any kind
            raise InputError(f"the chat template refused these messages: {error}") from error
        prompt = str(text)
    ids = tokenizer(prompt, add_special_tokens=not chat).input_ids
    if not ids:
        raise InputError("the prompt has no tokens.")
    return list(ids)


class TextStream:
    """Pieces of one row's text as it is generated (`texts`), and how long they took so far.

    The text ends before a stop string. With a cache, `ids` are the tokens after those it holds.
    """

    def __init__(
        self,
        params: Params,
        tokenizer: PreTrainedTokenizerFast,
        ids: list[int],
        cfg: Config,
        cache: PromptCache | None = None,
    ) -> None:
        self.prompt_tokens, self.new_tokens = len(ids), 0
        self.last_token: int | None = None
        self.passes = self.drafted = self.accepted = 0
        self.prefill, self.decode = Stopwatch(), Stopwatch()
        if cfg.num_return_sequences > 1:
            raise InputError("a text stream is of one row: leave out num_return_sequences.")
        # It checks the input at once.
        self._steps = stream(params, [ids], cfg, cache=cache, tokenizer=tokenizer)
        pieces = text_pieces(tokenizer, ids, self._tokens())
        self.texts = before_stop(pieces, cfg.stop)

    def cache(self) -> PromptCache:
        """Everything but `last_token`, for a call that continues it; it ends the stream."""
        return self._steps.cache()

    def _tokens(self) -> Iterator[int]:
        while True:
            with self.decode if self.new_tokens else self.prefill:
                step = next(self._steps, None)
            if step is None:
                return
            self.new_tokens += 1
            for name in ("passes", "drafted", "accepted"):
                setattr(self, name, int(getattr(step, name)[0]))
            self.last_token = int(step.tokens[0])
            yield self.last_token

    def summary(self, *, stats: bool = False) -> str:
        """One line: tokens per second of prefill and decode, and the programs compiled.

        `stats` adds the steps that new tokens took, and the drafted ones.
        """
        prefill, decode = self.prefill, self.decode
        line = f"[prefill {self.prompt_tokens} tokens in {prefill.run:.2f} s "
        line += f"({self.prefill_rate:.0f} tokens/s) · "
        if self.new_tokens > 1:
            line += f"decode {self.new_tokens - 1} tokens in {decode.run:.2f} s "
            line += f"({self.decode_rate:.1f} tokens/s) · "
        if stats:
            line += f"{self.new_tokens} tokens in {self.passes + 1} passes, "
            line += f"{self.accepted} of {self.drafted} drafted ones kept · "
        line += f"compiling {prefill.compiled + decode.compiled} programs, "
        line += f"{prefill.cached + decode.cached} from the cache: "
        return f"{line}{prefill.compile + decode.compile:.1f} s]"

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second; the first new token comes with them."""
        return self.prompt_tokens / max(self.prefill.run, 1e-9)

    @property
    def decode_rate(self) -> float:
        """New tokens a second, the first one not counted."""
        return (self.new_tokens - 1) / max(self.decode.run, 1e-9)


def text_pieces(
    tokenizer: PreTrainedTokenizerFast, prompt_ids: list[int], new_ids: Iterable[int]
) -> Iterator[str]:
    """Decode new tokens as they come, without special tokens.

    The prompt's decide the leading space. A character of several tokens comes whole.
    """
    backend = tokenizer.backend_tokenizer
    decoder = DecodeStream(ids=prompt_ids, skip_special_tokens=True)
    pending: list[int] = []
    for token in new_ids:
        pending.append(token)
        if text := decoder.step(backend, token):
            pending.clear()
            yield text
    if text := backend.decode(pending, skip_special_tokens=True):  # a character cut by the end
        yield text


def before_stop(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """A text in pieces up to the first stop string; what may begin one waits for the next piece."""
    waiting = ""
    for piece in pieces:
        waiting += piece
        text = cut(waiting, stop)
        if len(text) < len(waiting):
            waiting = text
            break
        safe = len(waiting) - held_back(waiting, stop)
        if safe:
            yield waiting[:safe]
        waiting = waiting[safe:]
    for _ in pieces:  # the tokens that complete a stop string are the last
        pass
    if waiting:
        yield waiting
