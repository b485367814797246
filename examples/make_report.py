"""What every token did at every layer, as one HTML file that opens from disk."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

from examples.text import LIGHTHOUSE
from qs_jax.commands.report import Report
from qs_jax.errors import exit_code


@dataclasses.dataclass
class Arguments:
    """Write the report of a text; `python -m qs_jax report` has all options."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    out: Path = Path("report.html")
    """The page."""
    text: str = LIGHTHOUSE
    """What is read."""
    presets: tuple[str, ...] = ("balanced", "small-cache")
    """What to compare with the dense model."""
    limit_tokens: int | None = None
    """Take the first tokens of the text only."""


def main(argv: list[str] | None = None) -> None:
    """Run the text under every preset and write the page."""
    args = tyro.cli(Arguments, prog="python -m examples.make_report", args=argv)
    report = Report(
        out=args.out,
        ckpt=args.ckpt,
        text=args.text,
        preset=args.presets,
        limit_tokens=args.limit_tokens,
        all_combinations=False,
        title="A text under " + " and ".join(args.presets),
        overwrite=True,
    )
    report.run()


if __name__ == "__main__":
    sys.exit(exit_code(main))
