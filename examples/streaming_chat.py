"""Chat in the terminal; answers appear as they are generated.

Every turn goes through the model's chat template with the turns before it. The oldest turns are
left out where the conversation would exceed the model's positions.
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

Message = dict[str, str]


@dataclasses.dataclass
class Arguments:
    """Chat with a converted checkpoint; an empty line or the end of the input ends it."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    preset: str = "off"
    """Mechanisms to run; balanced and aggressive act on what is read, not on the answers."""
    system: str | None = None
    """System message."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.7
    """0 is greedy."""
    seed: int = 0
    """Of the sampler; each turn adds one."""


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], limit: int
) -> list[int]:
    """Tokens of a conversation, without its oldest turns where there are too many.

    Raises:
      InputError: The last message alone is too long.
    """
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    while turns:
        ids = _encode(tokenizer, system + turns)
        if len(ids) <= limit:
            return ids
        turns = turns[2:]  # a question and its answer
    raise InputError(f"the message has more than the {limit} tokens there is room for.")


def _encode(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    if tokenizer.chat_template is None:  # not a chat model: a plain transcript
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return list(tokenizer("".join(lines) + "assistant:").input_ids)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(str(text), add_special_tokens=False).input_ids)


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
    messages: list[Message] = []
    if args.system is not None:
        messages.append({"role": "system", "content": args.system})
    limit = model.max_positions - args.max_new_tokens
    for turn, question in enumerate(questions()):
        messages.append({"role": "user", "content": question})
        ids = prompt_ids(tokenizer, messages, limit)
        stream = TextStream(params, tokenizer, ids, cfg.replace(seed=args.seed + turn))
        answer = []
        print("model> ", end="", flush=True)
        for text in stream.texts:
            print(text, end="", flush=True)
            answer.append(text)
        print(f"\n{stream.summary()}")
        messages.append({"role": "assistant", "content": "".join(answer)})


if __name__ == "__main__":
    sys.exit(exit_code(main))
