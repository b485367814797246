"""Jitted programs as calls enter them, for tests that lower or compile them."""

import importlib
from typing import Any

import pytest


class Entered(Exception):
    """A call has reached a program."""


def arguments_of(call: Any, module: str, name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The program `qs_jax.engine.MODULE.NAME`, and the positional and static arguments of a call.

    The call ends where it enters the program.
    """
    home = importlib.import_module(f"qs_jax.engine.{module}")
    program, found = getattr(home, name), []

    def enter(*arrays: Any, **static: Any) -> None:
        found.append((arrays, static))
        raise Entered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, name, enter)
        with pytest.raises(Entered):
            call()
    return program, *found[0]
