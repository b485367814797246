"""Where the time of a prompt goes, dense and under a preset, by the scopes named in the code.

`python -m benchmarks.trace` does this for prefill and decode; here is the core of it.
The traces stay in `--out`: docs/profiling.md says how to open them.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import qs_jax
from benchmarks import trace
from qs_jax.errors import exit_code


@dataclasses.dataclass
class Arguments:
    """Profile the prefill of a random prompt."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    out: Path = Path("traces")
    """Folder for the traces."""
    preset: str = "balanced"
    """Mechanisms to run, beside the dense model."""
    batch_size: int = 2
    """Rows."""
    prompt: int = 256
    """Tokens of each."""


def main(argv: list[str] | None = None) -> None:
    """Trace both and print milliseconds by scope."""
    args = tyro.cli(Arguments, prog="python -m examples.profiling", args=argv)
    params, model = qs_jax.load(args.ckpt)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (args.batch_size, args.prompt), np.int32)
    found = {}
    for name in dict.fromkeys(("off", args.preset)):
        quicksilver = qs_jax.presets.by_name(name, model)
        cfg = qs_jax.Config(model, quicksilver, max_new_tokens=1, eos_token_ids=())
        name = Path(name).stem
        found[name] = trace.profile(
            lambda cfg=cfg: qs_jax.generate(params, tokens, cfg), folder=args.out / name
        )

    table = Table(title=f"prefill of {args.batch_size} x {args.prompt} tokens, ms")
    table.add_column("scope")
    for name in found:
        table.add_column(name, justify="right")
    for scope, label in trace.COMPONENTS.items():
        cells = [f"{seconds.get(scope, 0) * 1e3:.2f}" for seconds in found.values()]
        table.add_row(label, *cells)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    for file in sorted(args.out.rglob("*.trace.json.gz")):
        console.print(f"Perfetto opens {file}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
