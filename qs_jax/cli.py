"""The command line: `python -m qs_jax COMMAND`, also installed as `qs-jax`."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import tyro

from qs_jax.commands.calibrate import Calibrate
from qs_jax.commands.diagnose import Diagnose
from qs_jax.commands.evaluate import Evaluate
from qs_jax.commands.generate import Generate
from qs_jax.commands.info import Info
from qs_jax.commands.report import Report
from qs_jax.commands.tasks import Tasks
from qs_jax.compilation_cache import enable_compilation_cache
from qs_jax.errors import QuickSilverError

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Tasks, tyro.conf.subcommand("tasks")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
    | Annotated[Info, tyro.conf.subcommand("info")]
)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows a ?
        sys.stdout.reconfigure(errors="replace")
    command = tyro.cli(Command, prog="qs-jax", args=argv)  # type: ignore[call-overload]
    enable_compilation_cache(getattr(command, "compilation_cache", None))
    try:
        command.run()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (QuickSilverError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UnicodeDecodeError as error:
        print(f"error: standard input is not UTF-8 ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0
