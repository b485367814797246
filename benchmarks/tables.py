"""Tables of the pages: they stand between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from qs_jax.files import write_whole

# The name of a table, where a page has a place for it.
MARKER = re.compile(r"^<!-- table: (.+) -->$", re.MULTILINE)
_MARKED = re.compile(r"(<!-- table: ([^\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table: cells as they are, the first column to the left."""
    align = ["left"] + ["right"] * (len(frame.columns) - 1)
    text = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    return re.sub(r" {2,}", " ", re.sub(r"-{3,}", "---", text))


def replace_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Rewrite those tables of a page that are given, by the name in the marker; others stay.

    A name that the page has no marker for is left out.
    """
    text = page.read_text(encoding="utf-8")

    def rewrite(match: re.Match[str]) -> str:
        table = tables.get(match[2])
        return match[0] if table is None else f"{match[1]}{table}\n{match[3]}"

    with write_whole(page) as (staged,):
        staged.write_text(_MARKED.sub(rewrite, text), encoding="utf-8")


def percent(value: float | None) -> str:
    """A share in per cent; empty where there is none."""
    return "" if value is None else f"{value:.1%}".replace("-0.0%", "0.0%")


def origin(content: Mapping[str, Any], *facts: str) -> str:
    """What a result file was made with, in one line; `facts` come first."""
    made, about = content["environment"], content.get("about", {})
    facts += tuple(about[name] for name in ("model", "text", "dtype") if name in about)
    facts += (made["processor"], f"{made['cores']} cores", f"Python {made['python']}")
    versions = {"jax": made["packages"]["jax"], **about.get("versions", {})}
    facts += tuple(f"{name} {version}" for name, version in versions.items())
    return ", ".join((*facts, f"commit {made['commit']}")) + "."
