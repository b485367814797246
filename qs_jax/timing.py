"""Seconds, with the time JAX spent compiling kept apart."""

from __future__ import annotations

import time

import jax

_BACKEND = "/jax/core/compile/backend_compile_duration"
_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _BACKEND,
)
# Seconds spent, programs needed, and those of them that the compilation cache had.
_seconds, _programs, _cached = 0.0, 0, 0


def _add_seconds(event: str, duration_secs: float, **_: str | int) -> None:
    global _seconds, _programs
    if event in _COMPILE_EVENTS:
        _seconds += duration_secs
        _programs += event == _BACKEND


def _count_hit(event: str, **_: str | int) -> None:
    global _cached
    _cached += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_duration_secs_listener(_add_seconds)
jax.monitoring.register_event_listener(_count_hit)


class Stopwatch:
    """Measures blocks that wait for their results: `with Stopwatch() as watch: ...`.

    `compile` is the seconds JAX spent tracing, lowering and compiling, or reading programs from the
    compilation cache (its own events; a function traced inside another counts twice, a matter of
    milliseconds), and `run` the others; `compiled` and `cached` count programs.
    """

    def __init__(self) -> None:
        self.compile = self.run = 0.0
        self.compiled = self.cached = 0

    def __enter__(self) -> Stopwatch:
        self._before = (time.perf_counter(), _seconds, _programs, _cached)
        return self

    def __exit__(self, *_: object) -> None:
        began, seconds, programs, cached = self._before
        compiling, hits = _seconds - seconds, _cached - cached
        self.compile += compiling
        self.cached += hits
        self.compiled += _programs - programs - hits
        self.run += max(time.perf_counter() - began - compiling, 0.0)
