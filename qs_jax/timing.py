"""Seconds, with the time JAX spent compiling kept apart."""

from __future__ import annotations

import time
from types import TracebackType

import jax

_COMPILE_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_compiled = 0.0


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _compiled
    if event in _COMPILE_EVENTS:
        _compiled += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


class Stopwatch:
    """Measures a block: `with Stopwatch() as watch: ...`, then `watch.run` and `watch.compile`.

    The block must wait for its results, as any that copies them to the host does.

    Attributes:
      compile: Seconds JAX spent tracing, lowering and compiling in the block (its own events; a
        function traced inside another counts twice, a matter of milliseconds).
      run: The remaining seconds.
    """

    def __init__(self) -> None:
        self.compile = 0.0
        self.run = 0.0

    def __enter__(self) -> Stopwatch:
        self._began, self._compiled = time.perf_counter(), _compiled
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        compiled = _compiled - self._compiled
        self.compile += compiled
        self.run += max(time.perf_counter() - self._began - compiled, 0.0)
