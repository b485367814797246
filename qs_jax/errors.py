"""The exceptions users can catch; each message says what was wrong and what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class QuickSilverError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(QuickSilverError, ValueError):
    """A configuration is invalid, contradictory or not supported."""


class InputError(QuickSilverError, ValueError):
    """Tokens, lengths or masks given to an entry point cannot be used."""


class CheckpointError(QuickSilverError):
    """A checkpoint folder is missing, incomplete or damaged."""


class NonFiniteError(QuickSilverError, FloatingPointError):
    """Weights or logits hold NaN or infinity."""


class InternalError(QuickSilverError):
    """Something the library promises did not hold: a defect of ours, please report it."""


def exit_code(run: Callable[[], object]) -> int:
    """Run a command; an error that users can cause becomes one line on standard error.

    Returns:
      The exit code of the process.
    """
    try:
        run()
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
