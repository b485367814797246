"""Passkey retrieval: does a model still find a number hidden in a long prompt under a preset?

A prompt is filler with one sentence in it that names a five-digit key, and ends where the key comes
next (Mohtashami and Jaggi 2023, with sentences of our own). Models are compared prompt by prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from tqdm import tqdm

from qs_jax.config import GREEDY, Config
from qs_jax.engine.devices import Devices
from qs_jax.engine.generate import generate
from qs_jax.errors import InputError
from qs_jax.evaluation.classification import mcnemar_p
from qs_jax.models import Params

ANSWER_TOKENS = 8  # a space, five digits, and two more
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

_OPENING = "A pass key is hidden in this text."
_NEEDLE = " The pass key is {}. Remember it."
_QUESTION = " What is the pass key? The pass key is"
_FILLER = """
 The ferry leaves the harbor at nine.
 Rain fell on the hills all night.
 Two men carried a table up the stairs.
 The baker opens his shop before dawn.
 A gray cat slept beside the stove.
 Children ran along the river with a kite.
 The old clock in the hall runs slow.
 She put the letters back in the drawer.
 Apples were cheap at the market this week.
 The train stopped twice in the valley.
 He painted the fence green in spring.
 Snow covers the road to the mill.
 The choir sings in the square on Sunday.
 A farmer sold his oldest horse.
 They drank tea and talked about the garden.
 The lamp by the window needs oil.
""".strip("\n").split("\n")


@dataclasses.dataclass(frozen=True)
class Passkey:
    """Token ids of a prompt, and the key that it holds at `depth`, a share of its filler."""

    ids: tuple[int, ...]
    key: str
    depth: float

    @property
    def length(self) -> int:
        """Tokens of the prompt and of its answer."""
        return len(self.ids) + ANSWER_TOKENS


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Which of the keys were found by the dense model, and which under a preset."""

    prompts: tuple[Passkey, ...]
    dense_P: Bool[np.ndarray, "P"]
    preset_P: Bool[np.ndarray, "P"]

    @property
    def lost(self) -> dict[int, int]:
        """Keys that only the dense model found, by length."""
        return {length: counts["only_dense"] for length, counts in self.by_length().items()}

    def by_length(self) -> dict[int, dict[str, Any]]:
        """Pairs of outcomes and McNemar's exact p-value, for each length."""
        lengths_P = _lengths(self.prompts)
        return {
            length: count_pairs(
                self.dense_P[lengths_P == length], self.preset_P[lengths_P == length]
            )
            for length in np.unique(lengths_P).tolist()
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain JSON types; `rows` are one prompt each."""
        columns = (_lengths(self.prompts).tolist(), self.dense_P.tolist(), self.preset_P.tolist())
        rows = [
            {"length": length, "depth": prompt.depth, "dense": dense, "preset": preset}
            for prompt, length, dense, preset in zip(self.prompts, *columns, strict=True)
        ]
        by_length = {str(length): counts for length, counts in self.by_length().items()}
        return count_pairs(self.dense_P, self.preset_P) | {"by_length": by_length, "rows": rows}


def count_pairs(dense_P: np.ndarray, preset_P: np.ndarray) -> dict[str, Any]:
    """Prompts by who was right, dense model or preset, and McNemar's exact p-value."""
    pairs = {"both": dense_P & preset_P, "only_dense": dense_P & ~preset_P}
    pairs |= {"only_preset": preset_P & ~dense_P, "neither": ~(dense_P | preset_P)}
    counts = {name: int(found_P.sum()) for name, found_P in pairs.items()}
    p_value = mcnemar_p(counts["only_dense"], counts["only_preset"])
    return {"prompts": len(dense_P), **counts, "mcnemar_p": p_value}


def make_passkeys(
    tokenizer: Any,
    lengths: Sequence[int],
    *,
    count: int = 32,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> list[Passkey]:
    """Make prompts that hide a key each.

    Args:
      tokenizer: Of the checkpoint.
      lengths: Tokens of a prompt and its answer, which takes `ANSWER_TOKENS`.
      count: Prompts of each length.
      depths: Shares of the filler that stand before the key, in turn; the key goes to the nearest
        end of a sentence.
      seed: Of the keys and the order of the sentences.

    Raises:
      InputError: A length has no room for the key and the question, or the tokenizer cannot spell
        them.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    opening, question = list(tokenizer(_OPENING).input_ids), encode(_QUESTION)
    sentences, rng = [encode(text) for text in _FILLER], np.random.default_rng(seed)
    prompts = []
    for length, number in ((length, number) for length in lengths for number in range(count)):
        key, depth = str(rng.integers(10_000, 100_000)), depths[number % len(depths)]
        needle = encode(_NEEDLE.format(key))
        if key not in tokenizer.decode(needle) or not all(sentences):
            raise InputError("this tokenizer cannot spell a passkey: it drops digits or letters.")
        fixed = len(opening) + len(needle) + len(question) + ANSWER_TOKENS
        if length < fixed:
            raise InputError(f"a passkey needs at least {fixed} tokens, got a length of {length}.")
        filler, ends = [], [0]
        while len(filler) < length - fixed:
            filler += sentences[rng.integers(len(sentences))]
            ends.append(len(filler))
        cut = len(filler) - (length - fixed)  # the first sentence loses its beginning
        wanted = cut + depth * (length - fixed)
        at = min((end for end in ends if end >= cut), key=lambda end: abs(end - wanted))
        ids = (*opening, *filler[cut:at], *needle, *filler[at:], *question)
        prompts.append(Passkey(ids, key, depth))
    return prompts


def find_passkeys(
    params: Params,
    cfg: Config,
    tokenizer: Any,
    prompts: Sequence[Passkey],
    *,
    batch_size: int = 8,
    devices: Devices | None = None,
    title: str | None = None,
) -> Bool[np.ndarray, "P"]:
    """Whether the greedy continuation of each prompt holds its key; a title shows a bar."""
    cfg = cfg.replace(max_new_tokens=ANSWER_TOKENS, speculate=None, **GREEDY)
    found_P, lengths_P = np.zeros(len(prompts), bool), _lengths(prompts)
    with tqdm(total=len(prompts), unit="prompt", desc=title, disable=title is None) as bar:
        for length in np.unique(lengths_P):  # rows of one length run without padding
            same = np.flatnonzero(lengths_P == length)
            for index in np.split(same, range(batch_size, len(same), batch_size)):
                out = generate(params, [prompts[i].ids for i in index], cfg, devices=devices)
                for row, i in enumerate(index):
                    text = tokenizer.decode(out.tokens[row, : out.lengths[row]].tolist())
                    found_P[i] = prompts[i].key in text
                bar.update(len(index))
    return found_P


def compare_passkeys(
    params: Params,
    cfg: Config,
    tokenizer: Any,
    prompts: Sequence[Passkey],
    *,
    batch_size: int = 8,
    devices: Devices | None = None,
    progress: bool = False,
) -> Comparison:
    """Let the dense model and the preset of `cfg` look for the same keys.

    Args:
      params: From `qs_jax.load`, with the maps that the preset reads.
      cfg: Model and preset; the sampling settings play no part.
      tokenizer: Of the checkpoint.
      prompts: From `make_passkeys`.
      batch_size: Rows at a time.
      devices: As `qs_jax.generate`.
      progress: Show a bar for each model.
    """

    def find(name: str, cfg: Config) -> np.ndarray:
        options: dict[str, Any] = {"batch_size": batch_size, "devices": devices}
        options["title"] = f"passkeys, {name}" if progress else None
        return find_passkeys(params, cfg, tokenizer, prompts, **options)

    dense_P = find("dense", cfg.replace(quicksilver=None))
    off = cfg.quicksilver is None or cfg.quicksilver.is_off
    return Comparison(tuple(prompts), dense_P, dense_P if off else find("preset", cfg))


def _lengths(prompts: Sequence[Passkey]) -> np.ndarray:
    return np.array([prompt.length for prompt in prompts])
