"""Where the time of a call goes, by the named scopes in the code (the paper's component table).

`jax.profiler` says when each XLA operation ran; the compiled program's text says which scope it
came from. Time in which several operations run is split among them, and time in which none does is
"idle". XLA fuses across scopes: a fused operation counts for the scope of its result; products
with a vector, which XLA rewrites on CPU without their scope, count as "other".
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.programs import Watch, watch

# A scope anywhere in an operation's path decides, the first of these first: an entropy inside a
# halting decision is a signal, and its head is not the model's.
SCOPES = ("kv_write", "amq", "signals", "halt", "fuse", "head", "attn", "mlp", "embed")
COMPONENTS = {
    "embed": "embedding",
    "attn": "attention",
    "mlp": "MLP",
    "kv_write": "KV write",
    "amq": "quantisation",
    "fuse": "fusion logic",
    "halt": "halting decisions",
    "signals": "signals",
    "head": "head",
    "other": "everything else",
    "idle": "idle",
}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?\s([a-z][\w\-]*)\(", re.MULTILINE)
_MODULE = re.compile(r"HloModule ([\w.\-]+)")
_PATH = re.compile(r'op_name="([^"]*)"')
_CONTAINERS = ("while", "conditional", "call")


class Interval(NamedTuple):
    """When an operation ran, in nanoseconds."""

    start: float
    end: float
    component: str


def scope_of(path: str) -> str:
    """The component of an operation from its path of scopes, "other" if it is in none."""
    parts = path.split("/")
    return next((scope for scope in SCOPES if scope in parts), "other")


def components_of(text: str) -> dict[str, str | None]:
    """Component of each instruction of a compiled program; None for those that hold others."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        path = _PATH.search(line)
        container = match[2] in _CONTAINERS
        found[match[1]] = None if container else scope_of(path[1] if path else "")
    return found


def attribute(intervals: Iterable[Interval], total: float) -> dict[str, float]:
    """Split wall time among components.

    At each moment, time goes in equal parts to the operations that run; the rest of `total` is
    "idle". The parts add up to `total`.

    Args:
      intervals: When operations ran.
      total: Wall time of the whole call, in the same unit.
    """
    events = [(i.start, 1, i.component) for i in intervals if i.end > i.start]
    events += [(i.end, -1, i.component) for i in intervals if i.end > i.start]
    running: dict[str, int] = {}
    found: dict[str, float] = {}
    before = 0.0
    for at, change, component in sorted(events):
        count = sum(running.values())
        if count:
            for name, here in running.items():
                found[name] = found.get(name, 0.0) + (at - before) * here / count
        running[component] = running.get(component, 0) + change
        before = at
    return found | {"idle": max(total - sum(found.values()), 0.0)}


def _intervals(
    planes: Iterable[Any], components: dict[str, dict[str, str | None]]
) -> list[Interval]:
    """Operations of a trace: on CPU an asynchronous one ends with an event of its own."""
    begun: dict[Any, tuple[float, str]] = {}
    plain: list[Interval] = []
    ends: dict[Any, float] = {}
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if event.name.startswith("end: "):
                    ends[stats.get("_c")] = event.start_ns + event.duration_ns
                    continue
                program = components.get(str(stats.get("hlo_module")), {})
                component = program.get(str(stats.get("hlo_op")))
                if component is None:
                    continue
                producer, finish = stats.get("_p"), event.start_ns + event.duration_ns
                if producer is None:
                    plain.append(Interval(event.start_ns, finish, component))
                else:
                    begun[producer] = (event.start_ns, component)
                    ends.setdefault(producer, finish)
    waited = [Interval(start, ends[key], name) for key, (start, name) in begun.items()]
    return plain + waited


def profile(
    call: Callable[..., Any],
    prepare: Callable[[], tuple[Any, ...]] = tuple,
    folder: Path | None = None,
) -> dict[str, float]:
    """Seconds of one warm call by component.

    Args:
      call: Runs programs of the engines; it is called once to compile, once to be traced.
      prepare: Makes its arguments, each time; not in the trace.
      folder: Keep the trace there; None forgets it.
    """
    with watch() as seen:
        call(*prepare())
    components = _of_programs(seen)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as temporary, watch() as traced:
        folder = folder or Path(temporary)
        arguments = prepare()
        before = traced.seconds
        with jax.profiler.trace(str(folder), profiler_options=options):
            call(*arguments)
        newest = max(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime_ns)
        data = jax.profiler.ProfileData.from_file(str(newest))
        intervals = _intervals(data.planes, components)
    found = attribute(intervals, (traced.seconds - before) * 1e9)
    return {name: value * 1e-9 for name, value in found.items()}


def _of_programs(seen: Watch) -> dict[str, dict[str, str | None]]:
    """Instructions of each program of a call, by the program's name.

    Of programs of one name, an instruction that several have counts as the first's.
    """
    found: dict[str, dict[str, str | None]] = {}
    for used in reversed(seen.used):
        text = used.compiled().as_text()
        name = _MODULE.match(text)
        assert name is not None, text[:80]
        found[name[1]] = found.get(name[1], {}) | components_of(text)
    return found
