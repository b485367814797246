"""From examples to token rows: prompts, label words, and what is cut where there is no room."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qs_jax.errors import InputError
from qs_jax.evaluation.tasks import Examples, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[Mapping[str, str]], list[int]]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Encoded inputs of a task.

    Attributes:
      rows: Token ids of each example.
      truncated: Examples whose passage was cut at its end to fit.
    """

    rows: tuple[list[int], ...]
    truncated: int


def prompt_encoder(task: Task, tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Encodes an example's fields as the task's prompt, with what the tokenizer puts before it."""
    return lambda fields: list(tokenizer(task.prompt(fields), verbose=False).input_ids)


def pair_encoder(task: Task, tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Encodes an example's fields as the tokenizer encodes one text or a pair of them.

    This is what Hugging Face's `run_glue.py` feeds a sequence classifier.

    Raises:
      InputError: The task has more than two fields.
    """
    names = [field[0] for field in task.fields]
    if len(names) > 2:
        raise InputError(f"{task.name} has {len(names)} fields; a tokenizer takes two at most.")

    def encode(fields: Mapping[str, str]) -> list[int]:
        text, pair = fields[names[0]], fields[names[1]] if len(names) > 1 else None
        return list(tokenizer(text, pair, verbose=False).input_ids)

    return encode


def encode_examples(task: Task, examples: Examples, encode: Encode, most: int) -> Prompts:
    """Encode all examples; those that are too long lose the end of their passage.

    Args:
      task: Names the passage.
      examples: What to encode.
      encode: Of `prompt_encoder` or `pair_encoder`.
      most: Tokens there is room for.

    Raises:
      InputError: An example has no tokens, or is too long without its passage.
    """
    rows, truncated = [], 0
    for number, item in enumerate(examples.items):
        row = encode(item.fields)
        if not row:
            raise InputError(f"{examples.name}: example {number} has no tokens.")
        if len(row) > most:
            row = _shortened(task, item.fields, encode, most)
            truncated += 1
        rows.append(row)
    return Prompts(tuple(rows), truncated)


def _shortened(task: Task, fields: Mapping[str, str], encode: Encode, most: int) -> list[int]:
    """The row with as many characters of the passage as fit."""
    passage = fields[task.passage]

    def row_of(characters: int) -> list[int]:
        return encode({**fields, task.passage: passage[:characters]})

    kept = bisect.bisect_right(range(len(passage)), most, key=lambda n: len(row_of(n))) - 1
    while kept > 0 and len(row_of(kept)) > most:  # merges make token counts not quite monotone
        kept -= 1
    row = row_of(max(kept, 0))
    if not 0 < len(row) <= most:
        raise InputError(
            f"an example of {task.name} has {len(row)} tokens without its {task.passage}, and "
            f"there is room for {most}."
        )
    return row


def word_tokens(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], ...]:
    """Token ids of each label word where it continues a prompt.

    Raises:
      InputError: A word has no tokens of its own, or two have the same.
    """
    before = list(tokenizer(task.domain, verbose=False).input_ids)
    words = []
    for label, word in zip(task.labels, task.words, strict=True):
        whole = list(tokenizer(task.domain + word, verbose=False).input_ids)
        ids = whole[len(before) :]
        told = f"{task.name}: the word {word!r} of label {label!r}"
        if whole[: len(before)] != before:
            raise InputError(
                f"{told} merges with the end of the prompt, {task.domain!r}; let words begin, and "
                "prompts not end, with a space."
            )
        if not ids:
            raise InputError(f"{told} tokenises to nothing; choose another.")
        if ids in words:
            other = task.labels[words.index(ids)]
            raise InputError(
                f"{told} tokenises as that of {other!r} does: the model cannot tell them apart."
            )
        words.append(ids)
    return tuple(words)
