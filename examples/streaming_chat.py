"""Chat in the terminal; answers appear as they are generated.

Every turn goes through the model's chat template. What was read and written before is in a cache,
so a turn costs its own tokens only. The oldest turns are left out where the conversation would
exceed the model's positions; what is left is then read anew.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

import qs_jax
from qs_jax.errors import InputError, exit_code
from qs_jax.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qs_jax import PromptCache

Message = dict[str, str]


@dataclasses.dataclass
class Arguments:
    """Chat with a converted checkpoint; an empty line or the end of the input ends it."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    preset: str = "off"
    """Mechanisms to run; balanced and small-cache act on what the first turn reads, later turns run
    dense."""
    system: str | None = None
    """System message."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """0 is greedy."""
    seed: int = 0
    """Of the sampler; each turn adds one."""


class Conversation:
    """Messages as text, and as tokens that a cache does not hold yet."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        self.tokenizer, self.limit = tokenizer, limit
        self.messages: list[Message] = []
        self.cache: PromptCache | None = None
        self._text, self._pending = "", list[int]()

    def ask(self, question: str) -> list[int]:
        """The tokens to run for a question's answer; `cache` is that of all before them.

        Raises:
          InputError: The question alone is too long.
        """
        self.messages.append({"role": "user", "content": question})
        text, before = self._render(self.messages), self._text
        if self.cache is not None and text.startswith(before):
            ids = [*self._pending, *self._encode(text[len(before) :])]
            if self.cache.lengths[0] + len(ids) <= self.limit:
                self._text = text
                return ids
        self.cache = None
        system = [message for message in self.messages if message["role"] == "system"]
        turns = [message for message in self.messages if message["role"] != "system"]
        while turns:
            self._text = self._render(system + turns)
            ids = self._encode(self._text, begins=self.tokenizer.chat_template is None)
            if len(ids) <= self.limit:
                self.messages = system + turns
                return ids
            turns = turns[2:]  # a question and its answer
        raise InputError(f"the message has more than the {self.limit} tokens there is room for.")

    def note(self, answer: str, stream: TextStream, ends: tuple[int, ...]) -> None:
        """Remember an answer; its last token was not run, and an end token the template writes."""
        self.messages.append({"role": "assistant", "content": answer})
        self.cache, last = stream.cache(), stream.last_token
        self._text += answer
        self._pending = [] if last is None or last in ends else [last]

    def _encode(self, text: str, begins: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=begins).input_ids)

    def _render(self, messages: list[Message]) -> str:
        if self.tokenizer.chat_template is None:  # not a chat model: a plain transcript
            # An answer brings its own space.
            space = {"assistant": ""}
            lines = [f"{m['role']}:{space.get(m['role'], ' ')}{m['content']}\n" for m in messages]
            return "".join(lines) + "assistant:"
        options = {"add_generation_prompt": True, "tokenize": False}
        return str(self.tokenizer.apply_chat_template(messages, **options))


def questions() -> Iterator[str]:
    """Lines the user types, until an empty one."""
    while True:
        print("you> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def main(argv: list[str] | None = None) -> None:
    """Ask, answer, remember."""
    args = tyro.cli(Arguments, prog="python -m examples.streaming_chat", args=argv)
    params, model = qs_jax.load(args.ckpt)
    tokenizer = qs_jax.load_tokenizer(args.ckpt)
    cfg = qs_jax.Config(
        model,
        qs_jax.presets.by_name(args.preset, model),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
    )
    chat = Conversation(tokenizer, model.max_positions - args.max_new_tokens)
    if args.system is not None:
        chat.messages.append({"role": "system", "content": args.system})
    for turn, question in enumerate(questions()):
        ids = chat.ask(question)
        settings = cfg.replace(seed=args.seed + turn)
        stream = TextStream(params, tokenizer, ids, settings, chat.cache)
        answer = []
        print("model> ", end="", flush=True)
        for text in stream.texts:
            print(text, end="", flush=True)
            answer.append(text)
        print(f"\n{stream.summary()}")
        chat.note("".join(answer), stream, cfg.stop_ids)


if __name__ == "__main__":
    sys.exit(exit_code(main))
