"""Timing what the public calls run: their jitted programs, found where the engines keep them.

A public call checks tokens, runs one or more programs and makes a record of their results. `watch`
measures the programs inside a call, so that the host's part can be told apart, and remembers how
each was called, so that the compiler can be asked for its memory and its instructions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax

_JITTED = type(jax.jit(lambda: None))
_ENGINES = "qs_jax.engine"


class Used(NamedTuple):
    """A program of a call and the shapes it was called with."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def compiled(self) -> Any:
        """The executable; after a call it comes from JAX's cache."""
        return self.function.lower(*self.args, **self.kwargs).compile()


class Watch:
    """What ran inside a `watch` block.

    Attributes:
      spent: Seconds in programs, each waited for, by the name of the function.
      used: The programs, in the order of their first call.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.used: list[Used] = []
        self._seen: set[int] = set()
        self._inside = False

    @property
    def seconds(self) -> float:
        """Spent in all programs."""
        return sum(self.spent.values())

    def wrap(self, function: Any) -> Callable[..., Any]:
        """A stand-in for a jitted function that is timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # traced as part of another program
                return function(*args, **kwargs)
            if id(function) not in self._seen:
                self._seen.add(id(function))
                # Shapes only: arrays may be donated.
                self.used.append(Used(function, *jax.tree.map(_shape_of, (args, kwargs))))
            self._inside = True
            began = time.perf_counter()
            try:
                return jax.block_until_ready(function(*args, **kwargs))
            finally:
                seconds = time.perf_counter() - began
                name = function.__name__
                self.spent[name] = self.spent.get(name, 0.0) + seconds
                self._inside = False

        return timed

    def memory(self) -> dict[str, int] | None:
        """Bytes of the largest program: what it takes, what it needs besides, and both.

        From the compiler's buffer assignment; None where the backend does not tell.
        """
        largest: dict[str, int] | None = None
        for used in self.used:
            stats = used.compiled().memory_analysis()
            if stats is None:
                continue
            found = {
                "argument_bytes": int(stats.argument_size_in_bytes),
                "temp_bytes": int(stats.temp_size_in_bytes),
            }
            found["peak_bytes"] = sum(found.values()) + int(
                stats.output_size_in_bytes - stats.alias_size_in_bytes
            )
            if largest is None or found["peak_bytes"] > largest["peak_bytes"]:
                largest = found
        return largest


def _shape_of(leaf: Any) -> Any:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        weak = getattr(leaf, "weak_type", False)
        # Where it is committed to a device: otherwise JAX takes it for another program.
        sharding = leaf.sharding if getattr(leaf, "committed", False) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak, sharding=sharding)
    return leaf


@contextmanager
def watch() -> Iterator[Watch]:
    """Time every jitted function that modules of the engines hold by name."""
    found, stands_in = Watch(), {}
    holders = [
        (module, name, value)
        for module_name, module in list(sys.modules.items())
        if module_name == _ENGINES or module_name.startswith(_ENGINES + ".")
        for name, value in list(vars(module).items())
        if isinstance(value, _JITTED)
    ]
    try:
        for module, name, value in holders:
            # One stand-in a function: modules compare programs with `is`.
            setattr(module, name, stands_in.setdefault(id(value), found.wrap(value)))
        yield found
    finally:
        for module, name, value in holders:
            setattr(module, name, value)
