"""The command line: `python -m qs_jax COMMAND`, also installed as `qs-jax`."""

from __future__ import annotations

import os

import tyro

from qs_jax.commands.calibrate import Calibrate
from qs_jax.commands.diagnose import Diagnose
from qs_jax.commands.evaluate import Evaluate
from qs_jax.commands.generate import Generate
from qs_jax.commands.info import Info
from qs_jax.commands.options import RunOptions
from qs_jax.commands.report import Report
from qs_jax.commands.tasks import Tasks
from qs_jax.compilation_cache import enable_compilation_cache
from qs_jax.errors import exit_code

Command = Generate | Evaluate | Calibrate | Tasks | Report | Diagnose | Info


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def run() -> None:
        command = tyro.cli(Command, prog="qs-jax", args=argv)  # type: ignore[call-overload]
        enable_compilation_cache(getattr(command, "compilation_cache", None))
        if isinstance(command, RunOptions):
            command.check()
        command.run()

    return exit_code(run)
