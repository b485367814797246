"""What an int8 projection takes, beside float32 and bfloat16, on this device.

`python -m benchmarks.int8 --ckpt DIR` times the projections of a model and rewrites the table in
docs/mechanisms.md. The int8 time includes quantising the input. Weights are random.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from qs_jax.mechanisms.execution import product_seconds, shapes

from benchmarks import environment
from benchmarks.tables import markdown, origin, replace_tables
from qs_jax.checkpoint import read_manifest
from qs_jax.config import ModelConfig

TOKENS = (1, 128, 2048)
DTYPES = ("float32", "bfloat16")
PAGE = Path("docs/mechanisms.md")


@dataclasses.dataclass
class Arguments:
    """Time the projections of a model."""

    ckpt: Path
    """Folder written by convert.hf_to_flax; only its sizes are read."""
    out: Path = environment.RESULTS / "int8.json"
    """JSON file."""


def rows(model: ModelConfig) -> list[dict[str, Any]]:
    """Seconds of each projection, and of all four, the kinds taking turns after a warm-up.

    "int8_gain" is the seconds of a float kind over those of int8: above 1, int8 is faster.
    """
    found = []
    for count in TOKENS:
        every = shapes(model).items()
        taken = {name: product_seconds(*sizes, count, DTYPES, 9, 0.05) for name, sizes in every}
        kinds = (*DTYPES, "int8")
        total = {kind: sum(seconds[kind] for seconds in taken.values()) for kind in kinds}
        for name, seconds in (taken | {"all four": total}).items():
            gain = {kind: seconds[kind] / seconds["int8"] for kind in DTYPES}
            about = {"projection": name, "tokens": count}
            found.append(about | {"seconds": seconds, "int8_gain": gain})
    return found


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown, and what they were made with."""
    lines = []
    for row in result["rows"]:
        line = {"": row["projection"], "tokens": f"{row['tokens']:,}"}
        line |= {f"{kind}, ms": f"{1e3 * time:.2f}" for kind, time in row["seconds"].items()}
        gains = row["int8_gain"].items()
        lines.append(line | {f"int8 over {kind}": f"{gain:.2f}" for kind, gain in gains})
    facts = origin(result, result["model"], result["device"])
    return f"{markdown(pd.DataFrame(lines))}\n\n{facts}"


def measure(args: Arguments) -> None:
    """Write the file and the table."""
    manifest = read_manifest(args.ckpt)
    result = {"model": manifest["source"], "device": jax.devices()[0].device_kind}
    result["rows"] = rows(ModelConfig.from_dict(manifest["model"]))
    environment.write("int8", result, args.out)
    replace_tables(PAGE, {"int8": table(json.loads(args.out.read_text()))})


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("int8", Arguments, measure, argv)


if __name__ == "__main__":
    main()
