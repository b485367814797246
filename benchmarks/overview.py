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
from benchmarks.timing import ratio
from qs_jax import presets
from qs_jax.errors import exit_code
from qs_jax.files import read_json

PAGE = Path("README.md")
# The files whose figures the README shows.
FILES = ("decode", "latency", "prompt_front")


def results() -> dict[str, Any]:
    """The result files by name, and what the shipped presets were verified to do."""
    verified = {
        name: read_json(path)["provenance"]["verified"] for name, path in presets.SHIPPED.items()
    }
    files = {name: read_json(environment.RESULTS / f"{name}.json") for name in FILES}
    return files | {"verified": verified}


def table(found: dict[str, Any]) -> pd.DataFrame:
    """A row for each preset that people choose."""
    speed = found["decode"]["lookup_over_plain"], found["decode"]["lookup_over_plain_copy_code"]
    drafted = f"{speed[0]:.1f} times as fast, copies {speed[1]:.1f}"
    decode = found["latency"]["groups"]["decode 1x128"]["rows"]
    lines = []
    for preset in ("balanced", "fast-answers", "small-cache"):
        source = "balanced" if preset == presets.FAST_ANSWERS else preset
        verified = found["verified"][source]
        probes = [entry["retrieval"] for entry in verified["lengths"].values()]
        lost, asked = (sum(probe[name] for probe in probes) for name in ("lost", "prompts"))
        plain = f"{1 / ratio(decode[source]):.2f} times as fast"
        lines.append(
            {
                "preset": f"`{preset}`",
                "perplexity (bound)": f"{verified['ppl_increase']:+.2f} "
                f"({verified['upper_bound']:+.2f})",
                "passkeys lost": f"{lost} of {asked}",
                "prompt time saved": percent(verified["measured_time_saved"]),
                "KV bytes saved": percent(verified["kv_bytes_saved"]),
                "answers": drafted if preset == presets.FAST_ANSWERS else plain,
            }
        )
    return pd.DataFrame(lines)


def main() -> None:
    """Rewrite the table."""
    replace_tables(PAGE, {"overview": markdown(table(results()))})


if __name__ == "__main__":
    sys.exit(exit_code(main))
