"""The exceptions users can catch; each message says what was wrong and what to do."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable

from qs_jax.jax_settings import default_settings, explain

LEAST_COLUMNS = 20  # of a terminal: tyro does not come to an end on a few


class QuickSilverError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(QuickSilverError, ValueError):
    """A configuration is invalid, contradictory or not supported."""


class InputError(QuickSilverError, ValueError):
    """Tokens, lengths or masks given to an entry point cannot be used."""


class CheckpointError(QuickSilverError):
    """A checkpoint folder is missing, incomplete or damaged."""


class OutputError(QuickSilverError, OSError):
    """A result cannot be written; what stood in its place still does."""


class NonFiniteError(QuickSilverError, FloatingPointError):
    """Weights or logits hold NaN or infinity."""


def exit_code(run: Callable[[], object]) -> int:
    """Run a command; an error that users can cause becomes one line. Returns the exit code."""
    _prepare_streams()
    try:
        with default_settings():
            run()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (QuickSilverError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


def _prepare_streams() -> None:
    """Make any terminal, or none, fit to read and print on."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed before the start
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows a ?
        sys.stdout.reconfigure(errors="replace")
    if shutil.get_terminal_size().columns < LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(LEAST_COLUMNS)
