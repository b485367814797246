"""What every configuration class uses to check its fields."""

from __future__ import annotations

import operator
from typing import Any

from qs_jax.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def as_integer(name: str, value: Any) -> int | None:
    """An int of anything that is one (NumPy scalars too)."""
    try:
        return None if value is None else operator.index(value)
    except TypeError as error:
        raise ConfigError(f"{name} must be an integer, got {value!r}.") from error


def as_float(name: str, value: Any) -> float | None:
    """A float of any number."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be a number, got {value!r}.") from error
