"""Keep negations out of the mechanisms' reach, and see what that changes.

A negation is short and frequent, so it looks cheap to stop early, and yet it turns a sentence
round (paper R.1). `protect_ids` leaves every token of these words alone.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import qs_jax
from examples.text import REVIEW
from qs_jax import diagnostics
from qs_jax.errors import InputError, exit_code

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = ("not", "no", "never", "nothing", "nobody", "none", "neither", "nor", "without", "n't")


@dataclasses.dataclass
class Arguments:
    """Compare a preset with and without protected negations, on one text."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    preset: str = "balanced"
    """Mechanisms to run."""
    text: str = REVIEW
    """What is read; its last part is scored."""
    continuation_tokens: int = 48
    """Tokens of the last part, for presets that act on prompts."""


def negation_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of negations that are a token of their own, in every spelling: with a space or a capital.

    Args:
      tokenizer: Of the checkpoint.
    """
    found = set()
    for word in WORDS:
        for spelling in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
            ids = tokenizer(spelling, add_special_tokens=False).input_ids
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                found.add(ids[0])
    return tuple(sorted(found))


def main(argv: list[str] | None = None) -> None:
    """Diagnose twice and print both."""
    args = tyro.cli(Arguments, prog="python -m examples.protect_negations", args=argv)
    params, model = qs_jax.load(args.ckpt)
    tokenizer = qs_jax.load_tokenizer(args.ckpt)
    ids = list(tokenizer(args.text).input_ids)
    protect = negation_ids(tokenizer)
    here = np.isin(ids, protect)
    if not here.any():
        raise InputError("the text has no negation that is one token of this checkpoint.")

    quicksilver = qs_jax.presets.by_name(args.preset, model)
    safe = dataclasses.replace(quicksilver, protect_ids=(*quicksilver.protect_ids, *protect))
    table = Table(
        title=f"{Path(args.preset).stem}, {len(ids)} tokens, {here.sum()} of them negations"
    )
    for column in (
        "",
        "perplexity",
        "KL, nats",
        "drift index\nof negations",
        "layer-tokens\nsaved",
    ):
        table.add_column(column, justify="right" if column else "left")
    for name, settings in ((args.preset, quicksilver), ("negations protected", safe)):
        cfg = qs_jax.Config(model, settings, continuation_tokens=args.continuation_tokens)
        found = diagnostics.diagnose(params, [ids], cfg)
        told = found.summary()
        if name == args.preset:
            table.add_row("dense", f"{told['dense_perplexity']:.3f}", "", "", "")
        table.add_row(
            Path(name).stem,
            f"{told['perplexity']:.3f}",
            f"{told['kl']:.2e}",
            f"{found.token_drift[0, here].mean():.4g}",
            f"{told['layer_tokens_saved']:.1%}",
        )
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    console.print("Savings are simulated; one text is an illustration, not a measurement.")


if __name__ == "__main__":
    sys.exit(exit_code(main))
