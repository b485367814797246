"""`python -m benchmarks.overview`: what each preset buys and costs, from the result files.

It measures nothing, and rewrites the table of README.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import environment
from benchmarks.tables import markdown, percent, replace_tables
from qs_jax import presets
from qs_jax.errors import exit_code
from qs_jax.files import read_json

PAGE = Path("README.md")
# The files whose figures the README shows.
FILES = ("decode", "prompt_front", "retrieval")


def results() -> dict[str, Any]:
    """The result files by name, and what the shipped presets were verified to do."""
    verified = {
        name: read_json(path)["provenance"]["verified"] for name, path in presets.SHIPPED.items()
    }
    files = {name: read_json(environment.RESULTS / f"{name}.json") for name in FILES}
    return files | {"verified": verified}


def passkeys_lost(found: dict[str, Any], preset: str) -> str:
    """Passkeys that the dense model finds and a preset does not, of all."""
    rows = [row[preset] for row in found["rows"] if row["probe"] == "passkey" and preset in row]
    lost, asked = (sum(row[name] for row in rows) for name in ("only_dense", "prompts"))
    return f"{lost} of {asked}" if rows else "not measured"


def table(found: dict[str, Any]) -> pd.DataFrame:
    """A row for each preset that people choose."""
    speed = found["decode"]["lookup_over_plain"], found["decode"]["lookup_over_plain_copy_code"]
    lines = []
    for preset, answers in (
        ("balanced", "as dense"),
        ("fast-answers", f"{speed[0]:.1f} times as fast; {speed[1]:.1f} where they copy"),
        ("small-cache", "as dense"),
    ):
        source = "balanced" if preset == "fast-answers" else preset
        verified = found["verified"][source]
        lines.append(
            {
                "preset": f"`{preset}`",
                "perplexity (bound)": f"{verified['ppl_increase']:+.2f} "
                f"({verified['upper_bound']:+.2f})",
                "prompt time saved": percent(verified["measured_time_saved"]),
                "KV bytes saved": percent(verified["kv_bytes_saved"]),
                "answers": answers,
                "passkeys lost": passkeys_lost(found["retrieval"], source),
            }
        )
    return pd.DataFrame(lines)


def main() -> None:
    """Rewrite the table."""
    replace_tables(PAGE, {"overview": markdown(table(results()))})


if __name__ == "__main__":
    sys.exit(exit_code(main))
