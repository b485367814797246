"""Weights in fewer bits: memory, perplexity and seconds, each beside bfloat16.

`python -m benchmarks.weights --ckpt DIR --data FILE` loads a checkpoint as bfloat16, int8 and,
where it came from a `.gguf` file, with that file's codes. It scores windows of a text
(teacher-forced), and times a prefill and decoding steps in turn.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pandas as pd

import qs_jax
from benchmarks import environment
from benchmarks.latency_rows import OurCall
from benchmarks.mechanisms import Inputs
from benchmarks.tables import markdown
from benchmarks.timing import interval, ratio, run_in_turn
from qs_jax.config import GREEDY, Config, ModelConfig
from qs_jax.errors import CheckpointError, exit_code
from qs_jax.evaluation import perplexity
from qs_jax.models import Params

KINDS = ("bfloat16", "int8", "gguf")
PROMPT, NEW = 128, 48
# What is timed of so many rows: a prefill, or the steps after it.
CALLS = {
    "step, 1 row": ("decode", 1),
    "step, 8 rows": ("decode", 8),
    "prefill 1 x 128": ("prefill", 1),
}


@dataclasses.dataclass
class Arguments(Inputs):
    """Compare the ways to hold the weights."""

    fit_windows: int = 0
    """Nothing is fitted."""
    rounds: int = 7
    """Runs of each row."""
    out: Path = environment.RESULTS / "weights.json"
    """JSON file."""


def load(args: Arguments) -> Iterator[tuple[str, Params, ModelConfig]]:
    """The checkpoint, with its weights held in each way that it can be."""
    for kind in KINDS:
        try:
            weights = None if kind == "bfloat16" else kind
            yield kind, *qs_jax.load(args.ckpt, dtype="bfloat16", weights=weights)
        except CheckpointError as error:  # it did not come from a .gguf file
            print(f"{kind} is left out: {error}")


def measure(args: Arguments) -> dict[str, Any]:
    """Score and time every kind of weights."""
    environment.check_out(args.out)
    _, _, tokens_WT, about = args.read("bfloat16")
    windows = perplexity.cut_windows(tokens_WT.reshape(-1).tolist(), args.seq_len)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, dict[str, OurCall]] = {name: {} for name in CALLS}
    for kind, params, model in load(args):
        found = perplexity.evaluate(params, windows, Config(model), batch_size=args.batch_size)
        held = {name: part for name, part in params.items() if name != "kv_maps"}
        size = sum(array.nbytes for array in jax.tree.leaves(held))
        rows[kind] = {"bytes": size, "perplexity": found["perplexity"]}
        for name, (section, batch) in CALLS.items():
            new = NEW if section == "decode" else 1
            cfg = Config(model, max_new_tokens=new, eos_token_ids=(), **GREEDY)
            prompts_BT = environment.random_tokens(model.vocab_size, batch, PROMPT)
            calls[name][kind] = OurCall(params, prompts_BT, section, cfg)
            calls[name][kind].warm()
    for name, measures in calls.items():
        timed = run_in_turn(measures, args.rounds, baseline=KINDS[0])
        for kind, row in timed.items():
            rows[kind][name] = {"ratio": ratio(row), "interval": interval(row)}
    content = {"about": about, "rows": rows}
    environment.write("weights", content, args.out)
    return content


def table(content: dict[str, Any]) -> pd.DataFrame:
    """A row for each kind of weights; times over those of bfloat16."""
    lines = []
    for kind, row in content["rows"].items():
        line = {"weights": f"`{kind}`", "MB": f"{row['bytes'] / 1e6:.0f}"}
        line["perplexity"] = f"{row['perplexity']:.2f}"
        for name in CALLS:
            line[name] = f"{row[name]['ratio']:.2f}"
            if (bounds := row[name]["interval"]) and kind != KINDS[0]:
                line[name] += f" ({bounds[0]:.2f} to {bounds[1]:.2f})"
        lines.append(line)
    return pd.DataFrame(lines)


def run(args: Arguments) -> None:
    """Measure, and print the table."""
    print(markdown(table(measure(args))))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("weights", Arguments, run, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
