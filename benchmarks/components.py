"""Where the time of a call goes, by the named scopes in the code (the paper's component table).

`jax.profiler` says when each XLA operation ran; the compiled program's text says which scope it
came from. Time in which several operations run is split among them, and time in which none does is
"idle". On CPU the event that ends an operation comes late when the thread that finishes it goes on
with what waited for it; an operation is over at the latest when one that reads its result begins.
XLA fuses across scopes: a fused operation counts for the scope of its result; products
with a vector, which XLA rewrites on CPU without their scope, count as "other".
"""

from __future__ import annotations

import bisect
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
_NAME = re.compile(r"%([\w.\-]+)")
_CONTAINERS = ("while", "conditional", "call")
# Operations that only name what others made; they do not run.
_NAMING = ("bitcast", "get-tuple-element", "tuple", "parameter")


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
    for name, operation, rest in _instructions(text):
        path = _PATH.search(rest)
        found[name] = None if operation in _CONTAINERS else scope_of(path[1] if path else "")
    return found


def _instructions(text: str) -> Iterator[tuple[str, str, str]]:
    """Name and operation of each instruction, and its line from the operands on."""
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is not None:
            yield match[1], match[2], line[match.end() :]


def readers_of(text: str) -> dict[str, set[str]]:
    """The instructions of a compiled program that read the result of each.

    Of one that only gives a result another name, they are the readers of that name. What follows in
    another round of a loop, or inside a branch, is not among them.
    """
    direct: dict[str, set[str]] = {}
    naming: set[str] = set()
    for name, operation, rest in _instructions(text):
        if operation in _NAMING:
            naming.add(name)
        for operand in _NAME.findall(rest.split(")", 1)[0]):
            direct.setdefault(operand, set()).add(name)

    def resolved(name: str) -> set[str]:
        readers = direct.get(name, set())
        return (readers - naming).union(*map(resolved, readers & naming))

    return {name: resolved(name) for name in direct}


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


class _Program(NamedTuple):
    """What is known of a program's instructions, by name."""

    components: dict[str, str | None]
    readers: dict[str, set[str]]


class _Begun(NamedTuple):
    """An operation whose end is an event of its own; `finish` is when its own event ended."""

    start: float
    finish: float
    component: str
    readers: list[tuple[str, str]]


def _intervals(planes: Iterable[Any], programs: dict[str, _Program]) -> list[Interval]:
    """Operations of a trace: on CPU an asynchronous one ends with an event of its own."""
    begun: dict[Any, _Begun] = {}
    plain: list[Interval] = []
    ends: dict[Any, float] = {}
    starts: dict[tuple[str, str], list[float]] = {}
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if event.name.startswith("end: "):
                    ends[stats.get("_c")] = event.start_ns + event.duration_ns
                    continue
                module, name = str(stats.get("hlo_module")), str(stats.get("hlo_op"))
                program = programs.get(module, _Program({}, {}))
                component = program.components.get(name)
                if component is None:
                    continue
                starts.setdefault((module, name), []).append(event.start_ns)
                producer, finish = stats.get("_p"), event.start_ns + event.duration_ns
                if producer is None:
                    plain.append(Interval(event.start_ns, finish, component))
                else:
                    readers = [(module, reader) for reader in program.readers.get(name, ())]
                    begun[producer] = _Begun(event.start_ns, finish, component, readers)
    for times in starts.values():
        times.sort()

    def over(key: Any, operation: _Begun) -> Interval:
        begins = [_next(starts.get(reader, []), operation.start) for reader in operation.readers]
        end = min([ends.get(key, operation.finish), *begins])
        return Interval(operation.start, max(operation.finish, end), operation.component)

    return plain + [over(key, operation) for key, operation in begun.items()]


def _next(times: list[float], after: float) -> float:
    """The first of rising times after one; infinity if there is none."""
    index = bisect.bisect_right(times, after)
    return times[index] if index < len(times) else float("inf")


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
    programs = _of_programs(seen)
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
        intervals = _intervals(data.planes, programs)
    found = attribute(intervals, (traced.seconds - before) * 1e9)
    return {name: value * 1e-9 for name, value in found.items()}


def _of_programs(seen: Watch) -> dict[str, _Program]:
    """Instructions of each program of a call, by the program's name.

    Of programs of one name, an instruction that several have counts as the first's.
    """
    found: dict[str, _Program] = {}
    for used in reversed(seen.used):
        text = used.compiled().as_text()
        name = _MODULE.match(text)
        assert name is not None, text[:80]
        before = found.get(name[1], _Program({}, {}))
        found[name[1]] = _Program(
            before.components | components_of(text), before.readers | readers_of(text)
        )
    return found
