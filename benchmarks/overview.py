"""The README's table: what each preset buys and costs, from the result files."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks import environment
from benchmarks.tables import percent
from benchmarks.timing import ratio
from qs_jax import presets
from qs_jax.files import read_json

# The files whose figures the README shows.
FILES = ("decode", "latency", "prompt_front")


def results() -> dict[str, Any]:
    """The result files by name, and what the shipped presets were verified to do."""
    verified = {
        name: read_json(path)["provenance"]["verified"] for name, path in presets.SHIPPED.items()
    }
    files = {name: environment.result(name) for name in FILES}
    return files | {"verified": verified}


def table(found: dict[str, Any]) -> pd.DataFrame:
    """A row for each preset that people choose."""
    gains = found["decode"]["lookup_over_plain"], found["decode"]["lookup_over_plain_copy_code"]
    drafted = f"{1 / gains[0]:.2f} (copies and code: {1 / gains[1]:.2f})"
    decode = found["latency"]["groups"]["decode 1x128"]["rows"]
    lines = []
    for preset in ("balanced", "fast-answers", "small-cache"):
        source = "balanced" if preset == presets.FAST_ANSWERS else preset
        verified = found["verified"][source]
        probes = [entry["retrieval"] for entry in verified["lengths"].values()]
        lost, asked = (sum(probe[name] for probe in probes) for name in ("lost", "prompts"))
        plain = f"{ratio(decode[source]):.2f}"
        lines.append(
            {
                "preset": f"`{preset}`",
                "perplexity (bound)": f"{verified['ppl_increase']:+.2f} "
                f"({verified['upper_bound']:+.2f})",
                "passkeys lost": f"{lost} of {asked}",
                "prompt time saved": percent(verified["measured_time_saved"]),
                "KV bytes saved": percent(verified["kv_bytes_saved"]),
                "answer's time / dense": drafted if preset == presets.FAST_ANSWERS else plain,
            }
        )
    return pd.DataFrame(lines)
