"""Rewrites docs/paper-tables.md: each table of the paper beside ours, from the result files.

`python -m benchmarks.paper_tables` measures nothing. A file that is not there gives cells that name
the command which makes it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro

from benchmarks import environment, mechanism_tables, paper_cells, paper_words
from benchmarks.paper_cells import COMMANDS, Results, dig
from benchmarks.tasks import HEADS

Part = Callable[[Results], str]
TABLES: dict[str, tuple[Part, Part]] = {
    "tables 2, 8, 12": (paper_cells.halting, paper_words.halting),
    "tables 3, 10": (paper_cells.bits, paper_words.bits),
    "table 4": (paper_cells.tasks, paper_words.tasks),
    "table 5": (paper_cells.walkthrough, paper_words.walkthrough),
    "table 7": (paper_cells.components, paper_words.components),
    "tables 9, 13": (paper_cells.fusion, paper_words.fusion),
    "table 11": (paper_cells.ablation, paper_words.ablation),
    "synergy": (paper_cells.synergy, paper_words.synergy),
    "c4": (paper_cells.texts, paper_words.texts),
    "emissions": (paper_cells.emissions, paper_words.emissions),
}


@dataclasses.dataclass
class Arguments:
    """Rewrite the tables of the paper beside ours."""

    results: Path = environment.RESULTS
    """Folder of result files."""
    page: Path = Path("docs/paper-tables.md")
    """Page whose tables are rewritten."""


def read(folder: Path) -> dict[str, Any]:
    """Result files by name; those that are not there are left out."""
    paths = {name: folder / f"{name}.json" for name in COMMANDS}
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.exists()
    }


def render(results: Results) -> Iterator[tuple[str, str]]:
    """Name and Markdown of each table: the table, and a sentence on the difference."""
    for name, (table, words) in TABLES.items():
        yield name, f"{table(results)}\n\n{words(results)}"
    yield "headline", headline(results)
    yield "sources", sources(results)


def headline(results: Results) -> str:
    """The paper's 39.6 % for at most 0.2 perplexity, and what calibration found."""
    head = ["", "FLOPs saved", "perplexity increase", "bound", "time saved"]
    lines = [["paper, abstract and section 4", "39.6%", "at most +0.2", "", "up to 50%"]]
    found: list[tuple[str, dict[str, Any]]] = []
    for name, entry in _verified(results.get("calibration")):
        if all(entry != shown for _, shown in found):  # the search names its result once more
            found.append((name, entry))
    for name, entry in found:
        exact, counted = entry["exact_flops_saved"], entry["paper_flops_saved"]
        cells = [name, f"{exact:.1%} exact, {counted:.1%} by the paper's account"]
        bound, time = entry.get("upper_bound"), entry.get("measured_time_saved")
        cells.append(f"{entry['ppl_increase']:+.2f}")
        cells.append("" if bound is None else f"{bound:+.2f}")
        lines.append([*cells, "not timed" if time is None else f"{time:.1%}"])
    if not found:
        lines.append(["calibrated here", *[paper_cells.missing("calibration")] * 4])
    return paper_cells.table(head, lines)


def _verified(content: Any, name: str = "calibrated") -> Iterator[tuple[str, dict[str, Any]]]:
    """What calibrated presets record under "verified", wherever in a file they stand."""
    if not isinstance(content, dict):
        return
    entry = content.get("verified")
    if isinstance(entry, dict) and entry.get("exact_flops_saved") is not None:
        yield name, entry
        return
    for key, value in content.items():
        yield from _verified(value, name if key in ("provenance", "preset") else key)


def sources(results: Results) -> str:
    """Where the numbers of each file come from."""
    lines = []
    for name, command in COMMANDS.items():
        content = results.get(name)
        if content is None:
            lines.append([f"`{name}.json`", f"`{command}`", "not measured yet", ""])
            continue
        about = dig(content, "about") or {}
        tasks = next((content[head] for head in HEADS.values() if head in content), {})
        model = about.get("model") or dig(tasks, "model", "source") or ""
        named = ("text", "windows", "seq_len", "batch_size", "dtype", "protocol")
        told = [f"{key} {about[key]}" for key in named if about.get(key) is not None]
        files = [entry["file"] for entry in (about.get("texts") or {}).values()]
        files += [dig(entry, "data", "name") or "" for entry in (tasks.get("tasks") or {}).values()]
        files += [entry.partition(":")[0].partition(",")[0] for entry in content.get("data") or ()]
        told += [f"commit {commit}" for commit in _commits(content)]
        lines.append([f"`{name}.json`", f"`{command}`", str(model), ", ".join(files + told)])
    return paper_cells.table(["file", "command", "model", "made with"], lines)


def _commits(content: dict[str, Any]) -> list[str]:
    """The commits that measured a file: of its parts where they tell, else of the run."""
    parts = [*(content.get("groups") or {}).values(), content.get("components_about") or {}]
    found = dict.fromkeys(part["commit"] for part in parts if part.get("commit"))
    run = dig(content, "environment", "commit") or content.get("git")
    return list(found) or ([run] if run else [])


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.paper_tables", args=argv)
    for name, table in render(read(args.results)):
        mechanism_tables.replace(args.page, name, table)
    print(f"The tables of {args.page} are up to date.")


if __name__ == "__main__":
    main()
