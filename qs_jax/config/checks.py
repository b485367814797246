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


def as_count(name: str, value: Any, least: int = 0) -> int:
    """A whole number of at least `least`."""
    number = as_integer(name, value)
    require(number is not None and number >= least, f"{name} must be {least} or more, got {value}.")
    assert number is not None
    return number


def as_integers(name: str, values: Any) -> tuple[int, ...]:
    """A tuple of ints of any list of them."""
    try:
        numbers = [as_integer(name, value) for value in values]
    except TypeError as error:
        raise ConfigError(f"{name} must be a list of integers, got {values!r}.") from error
    require(None not in numbers, f"{name} must be a list of integers, got {values!r}.")
    return tuple(number for number in numbers if number is not None)


def as_bool(name: str, value: Any) -> bool:
    """A truth value that is one."""
    require(value in (True, False) and not isinstance(value, str), f"{name} must be true or false.")
    return bool(value)


def as_float(name: str, value: Any) -> float | None:
    """A float of any number."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be a number, got {value!r}.") from error
