"""GLUE and SuperGLUE, the dense model against a preset, and the tables of docs/tasks.md.

`python -m benchmarks.tasks --ckpt DIR --data DIR` measures every task by label words and with a
fitted linear head, writes benchmarks/results/tasks.json, and rewrites the tables. Savings are
simulated: counted from the masked engine's masks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from benchmarks import environment
from benchmarks.tables import replace_tables
from qs_jax.commands.tasks import Tasks, measure
from qs_jax.evaluation.tasks import TASKS

HEADS = {"none": "zero-shot", "linear": "linear head"}


@dataclasses.dataclass
class Arguments:
    """Measure the tasks and rewrite the tables."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """Folder written by convert.hf_to_flax."""
    data: str = "hub"
    """A folder of local files, or hub."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which tasks."""
    preset: str = "balanced"
    """Compared with the dense model."""
    limit: int = 200
    """Examples drawn of each task; the linear head is fitted on half of them."""
    batch_size: int = 16
    """Rows at a time."""
    heads: tuple[str, ...] = tuple(HEADS)
    """none (label words), linear."""
    out: Path = environment.RESULTS / "tasks.json"
    """JSON file."""
    docs: tuple[Path, ...] = (Path("docs/tasks.md"),)
    """Pages whose tables are rewritten."""
    tables_only: bool = False
    """Rewrite the tables from the JSON file, measure nothing."""


def run(args: Arguments) -> None:
    """Measure with each head; the file is written after each."""
    content: dict[str, Any] = {}
    for head in args.heads:
        options = Tasks(
            ckpt=args.ckpt,
            tasks=args.tasks,
            data=args.data,
            out=args.out,
            preset=args.preset,
            limit=args.limit,
            head=head,
            batch_size=args.batch_size,
            dtype="float32",
            overwrite=True,
        )
        found = measure(options)
        for task in found["tasks"].values():
            del task["per_example"]  # the hash of the examples stays
        content[HEADS[head]] = found
        environment.write("tasks", content, args.out)


def render(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and Markdown of each table."""
    for name in HEADS.values():
        if name in content:
            yield name, _table(content[name])
    if "zero-shot" in content:
        yield "ways", _ways(content["zero-shot"])
    yield "about", _about(content)


def _table(found: dict[str, Any]) -> str:
    preset = found["config"]["preset"]
    head = ["task", "examples", "tokens of a prompt", "metric", "largest class", "dense", preset]
    head += ["change", "answers changed", "McNemar p", "exact FLOPs saved", "paper FLOPs saved"]
    lines = []
    for name, task in found["tasks"].items():
        change, other = task["difference"], task["quicksilver"]
        cells = [name, f"{task['examples']:,}", f"{task['mean_prompt_tokens']:.0f}"]
        cells += [task["metric"], f"{max(task['class_shares'].values()):.3f}"]
        cells += [_cell(task["dense"]), _cell(other), _cell(change, "+")]
        cells += [str(change["changed"]), f"{change['mcnemar_p']:.2g}"]
        cells += [f"{other['saved'][f'{n}_flops_saved']:.1%}" for n in ("exact", "paper")]
        lines.append(cells)
    return _markdown(head, lines, left=(0, 3))


def _ways(found: dict[str, Any]) -> str:
    """What each way to score words gives, dense."""
    names = next(iter(found["tasks"].values()))["dense"]["ways"]
    lines = [
        [name, task["metric"], *(_cell(task["dense"]["ways"][way]) for way in names)]
        for name, task in found["tasks"].items()
    ]
    return _markdown(["task", "metric", *names], lines, left=(0, 1))


def _markdown(head: list[str], lines: list[list[str]], left: tuple[int, ...]) -> str:
    rule = "|" + "|".join("---" if i in left else "---:" for i in range(len(head))) + "|"
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    return "\n".join([rows[0], rule, *rows[1:]])


def _cell(result: dict[str, Any], sign: str = "") -> str:
    shown = f"{result['value']:{sign}.3f}"
    if result["interval"] is None:
        return shown
    low, high = result["interval"]
    return f"{shown} ({low:{sign}.3f} to {high:{sign}.3f})"


def _about(content: dict[str, Any]) -> str:
    found = next(content[name] for name in HEADS.values() if name in content)
    made, config = content["environment"], found["config"]
    files = ", ".join(task["data"]["name"] for task in found["tasks"].values())
    return (
        f"{found['model']['source']}, {files}, at most {config['limit']} rows of each, drawn with "
        f"seed {config['seed']}, protocol {config['protocol']}, engine {config['engine']}, "
        f"{config['dtype']}, batch {config['batch_size']}, Python {made['python']}, "
        f"jax {made['packages']['jax']}, {made['processor']}, {made['cores']} cores, "
        f"commit {made['commit']}."
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.tasks", args=argv)
    if not args.tables_only:
        run(args)
    for page in args.docs:
        replace_tables(page, dict(render(json.loads(args.out.read_text()))))
    print(f"{args.out} and the tables of {', '.join(map(str, args.docs))} are up to date.")


if __name__ == "__main__":
    main()
