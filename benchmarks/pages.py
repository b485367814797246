"""`python -m benchmarks.pages`: every table and picture of README and docs, from the result files.

It measures nothing. A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks import (
    carbon,
    decode,
    front,
    latency_figures,
    mechanism_pictures,
    mechanisms,
    overview,
    paper_tables,
    retrieval,
    shipped,
    tasks,
    weights,
)
from benchmarks.environment import RESULTS, result
from benchmarks.gpu import rows as gpu
from benchmarks.linguistics import tables as linguistics
from benchmarks.pictures import FOLDER
from benchmarks.tables import MARKER, markdown, replace_tables
from qs_jax.errors import exit_code

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "docs", "docs/mechanisms", "benchmarks", "benchmarks/gpu")


def pages() -> dict[Path, list[str]]:
    """Every page that has tables, and their names."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md"))]
    named = {path: MARKER.findall(path.read_text(encoding="utf-8")) for path in found}
    return {path: names for path, names in named.items() if names}


def tables() -> dict[str, str]:
    """Every table by its name, in Markdown."""
    heads = tasks.HEADS.values()
    words = linguistics.make_tables(result("linguistics")).items()
    found: tuple[Mapping[str, str], ...] = (
        paper_tables.render(),
        mechanisms.tables(result("mechanisms")),
        shipped.tables(result("calibration")),
        front.tables(result("prompt_front")),
        latency_figures.tables(result("latency")),
        decode.tables(result("decode")),
        gpu.tables(result("gpu")),
        {name: markdown(tasks.table(result("tasks")[name])) for name in heads},
        {name: markdown(frame) for name, frame in words},
        {
            "carbon": carbon.table(result("carbon")),
            "overview": markdown(overview.table(overview.results())),
            "retrieval": markdown(retrieval.table(result("retrieval"))),
            "weights": markdown(weights.table(result("weights"))),
        },
    )
    every = {name: table for part in found for name, table in part.items()}
    assert len(every) == sum(map(len, found)), "two tables have one name"
    return every


def draw(folder: Path) -> None:
    """Draw every picture as SVG."""
    changes = mechanisms.changes(result("mechanisms"))
    mechanism_pictures.draw(changes, result("calibration"), result("prompt_front"), folder)
    front.draw(result("prompt_front"), folder / "front.svg")


def main() -> None:
    """The command, which has no options."""
    every = tables()
    for page in pages():
        replace_tables(page, every)
    draw(ROOT / FOLDER)
    print(f"{len(every)} tables and the pictures are those of {RESULTS}.")


if __name__ == "__main__":
    sys.exit(exit_code(main))
