"""Perplexity of a text on one device and on all of them (`jax.pmap`): the same number, sooner.

On a machine with one CPU device, `--virtual-devices 4` makes four of it: nothing gets faster, but
it shows how the rows are split.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

import qs_jax
from examples.text import LIGHTHOUSE
from qs_jax.errors import exit_code
from qs_jax.evaluation.perplexity import cut_windows, results, score_windows


@dataclasses.dataclass
class Arguments:
    """Score the windows of a text on one device and on all."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    text: Path | None = None
    """A text file; by default a short text of ours."""
    preset: str = "off"
    """Mechanisms to run."""
    seq_len: int = 64
    """Tokens of each window."""
    continuation_tokens: int = 16
    """Scored tokens of each window, for presets that act on prompts."""
    batch_size: int = 4
    """Windows at a time, split over the devices."""
    virtual_devices: int | None = None
    """Split the CPU into so many devices."""


def main(argv: list[str] | None = None) -> None:
    """Score on one device, then on all."""
    args = tyro.cli(Arguments, prog="python -m examples.pmap_evaluation", args=argv)
    if args.virtual_devices is not None:
        jax.config.update("jax_num_cpu_devices", args.virtual_devices)  # before any is used
    devices = jax.local_devices()
    params, model = qs_jax.load(args.ckpt)
    text = LIGHTHOUSE if args.text is None else args.text.read_text(encoding="utf-8")
    ids = qs_jax.load_tokenizer(args.ckpt)(text, verbose=False).input_ids
    tokens_WT = cut_windows(ids, args.seq_len).tokens_WT
    quicksilver = qs_jax.presets.by_name(args.preset, model)
    cfg = qs_jax.Config(model, quicksilver, continuation_tokens=args.continuation_tokens)
    engine = None if quicksilver.is_off else cfg.engine

    table = Table(
        title=f"{len(tokens_WT)} windows of {args.seq_len} tokens, {Path(args.preset).stem}"
    )
    for column in ("devices", "perplexity", "seconds, compiled before"):
        table.add_column(column, justify="right")
    for count in sorted({1, len(devices)}):
        used = devices[:count] if count > 1 else None

        def run(used=used):
            options = {"batch_size": args.batch_size, "devices": used}
            batches = score_windows(params, tokens_WT, cfg, **options)
            return results(list(batches), engine=engine)

        run()
        began = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - began
        table.add_row(str(count), f"{found['perplexity']:.6f}", f"{seconds:.2f}")
    Console(highlight=False, markup=False, emoji=False).print(table)


if __name__ == "__main__":
    sys.exit(exit_code(main))
