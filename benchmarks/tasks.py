"""GLUE and SuperGLUE, the dense model against a preset.

`python -m benchmarks.tasks --ckpt DIR --data DIR` runs `python -m qs_jax tasks` by label words and
with a fitted linear head, and writes benchmarks/results/tasks.json. Savings are simulated: counted
from the masked engine's masks.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import tyro

from benchmarks import environment
from benchmarks.tables import markdown
from qs_jax.commands.tasks import Tasks
from qs_jax.errors import exit_code
from qs_jax.evaluation.tasks import TASKS

HEADS = {"none": "zero-shot", "linear": "linear head"}


@dataclasses.dataclass
class Arguments:
    """Measure the tasks."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    data: str = "hub"
    """A folder of local files, or hub."""
    preset: str = "balanced"
    """Compared with the dense model."""
    limit: int = 200
    """Examples drawn of each task; the linear head is fitted on half of them."""
    out: Path = environment.RESULTS / "tasks.json"
    """JSON file."""


def run(args: Arguments) -> None:
    """Measure with each head; the file is written after each."""
    content: dict[str, Any] = {}
    shared = {name: getattr(args, name) for name in ("ckpt", "data", "preset", "limit", "out")}
    for head, name in HEADS.items():
        options = Tasks(tasks=tuple(TASKS), head=head, dtype="float32", overwrite=True, **shared)
        content[name] = options.measure()
        for task in content[name]["tasks"].values():
            del task["per_example"]  # the hash of the examples stays
        environment.write("tasks", content, args.out)


def table(measured: dict[str, Any]) -> pd.DataFrame:
    """The dense model, the preset and their difference on each task."""
    preset, lines = measured["config"]["preset"], []
    for name, task in measured["tasks"].items():
        change, other = task["difference"], task["quicksilver"]
        lines.append(
            {
                "task": name,
                "examples": task["examples"],
                "tokens of a prompt": f"{task['mean_prompt_tokens']:.0f}",
                "largest class": f"{max(task['class_shares'].values()):.3f}",
                "dense": f"{task['dense']['value']:.3f}",
                f"`{preset}`": f"{other['value']:.3f}",
                "change": cell(change, "+"),
                "McNemar p": f"{change['mcnemar_p']:.2g}",
                "exact FLOPs saved": f"{other['saved']['exact_flops_saved']:.1%}",
            }
        )
    return pd.DataFrame(lines)


def cell(result: dict[str, Any], sign: str = "") -> str:
    shown = f"{result['value']:{sign}.3f}"
    if result["interval"] is None:
        return shown
    low, high = result["interval"]
    return f"{shown} ({low:{sign}.3f} to {high:{sign}.3f})"


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.tasks", args=argv)
    run(args)
    content = json.loads(args.out.read_bytes())
    for name in HEADS.values():
        print(f"{name}\n{markdown(table(content[name]))}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
