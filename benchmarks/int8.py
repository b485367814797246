"""What an int8 projection takes, beside float32 and bfloat16, on this device.

`python -m benchmarks.int8 --ckpt DIR` times the four projections of a model at 1, 128 and 2,048
tokens, writes benchmarks/results/int8.json, and rewrites the table in docs/mechanisms.md. The int8
time includes quantising the input. Weights are random: the shapes decide.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from benchmarks import environment, mechanism_tables
from qs_jax.checkpoint import read_manifest
from qs_jax.config import ModelConfig
from qs_jax.mechanisms.execution import LEAST_GAIN, product_seconds, shapes

TOKENS = (1, 128, 2048)
DTYPES = ("float32", "bfloat16")


def rows(
    model: ModelConfig, tokens: tuple[int, ...] = TOKENS, rounds: int = 9, seconds: float = 0.05
) -> list[dict[str, Any]]:
    """Seconds of each projection, the kinds taking turns after a warm-up (`product_seconds`).

    Args:
      model: Sizes.
      tokens: Rows of the products.
      rounds: Turns of each kind.
      seconds: Length of a turn.

    Returns:
      "projection" (or "all four"), "inputs", "outputs", "tokens", "seconds" by kind, and
      "int8_gain", seconds of each float kind over those of int8: above 1, int8 is faster.
    """
    found = []
    for count in tokens:
        total = dict.fromkeys((*DTYPES, "int8"), 0.0)
        for name, (inputs, outputs) in shapes(model).items():
            taken = product_seconds(inputs, outputs, count, DTYPES, rounds, seconds)
            total = {kind: total[kind] + taken[kind] for kind in total}
            found.append(_row(name, inputs, outputs, count, taken))
        found.append(_row("all four", None, None, count, total))
    return found


def _row(
    name: str, inputs: int | None, outputs: int | None, tokens: int, seconds: dict[str, float]
) -> dict[str, Any]:
    gain = {kind: seconds[kind] / seconds["int8"] for kind in DTYPES}
    about = {"projection": name, "inputs": inputs, "outputs": outputs, "tokens": tokens}
    return about | {"seconds": seconds, "int8_gain": gain}


@dataclasses.dataclass
class Arguments:
    """Time the projections of a model."""

    ckpt: Path
    """Folder written by convert.hf_to_flax; only its sizes are read."""
    out: Path = environment.RESULTS / "int8.json"
    """JSON file."""
    docs: Path = Path("docs/mechanisms.md")
    """Page whose table is rewritten."""


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    head = ["", "tokens", *DTYPES, "int8", *(f"int8 over {kind}" for kind in DTYPES)]
    lines = [_line(head), "|---|" + "---:|" * (len(head) - 1)]
    for row in result["rows"]:
        times = [f"{row['seconds'][kind] * 1e3:.2f} ms" for kind in (*DTYPES, "int8")]
        gains = [f"{row['int8_gain'][kind]:.2f}" for kind in DTYPES]
        lines.append(_line([row["projection"], f"{row['tokens']:,}", *times, *gains]))
    made = result["environment"]
    lines.append("")
    lines.append(
        f"{result['model']}, {result['device']}, {made['processor']}, {made['cores']} cores, jax "
        f"{made['packages']['jax']}, commit {made['commit']}."
    )
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.int8", args=argv)
    manifest = read_manifest(args.ckpt)
    model = ModelConfig.from_dict(manifest["model"])
    device = jnp.zeros(()).device
    result = {
        "model": manifest["source"],
        "device": f"{jax.default_backend()}: {device.device_kind}",
        "least_gain": LEAST_GAIN,
        "rows": rows(model),
    }
    environment.write("int8", result, args.out)
    mechanism_tables.replace(args.docs, "int8", table(json.loads(args.out.read_text())))
    print(f"{args.out} and the table of {args.docs} are up to date.")


if __name__ == "__main__":
    main()
