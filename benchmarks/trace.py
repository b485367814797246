"""Where the time of a call goes, by the named scopes in the code, and traces for viewers.

`python -m benchmarks.trace --ckpt DIR --out DIR` traces a prefill and decoding, prints the time of
each scope, and leaves the traces and scopes.json in `--out`.

`jax.profiler` says when each XLA operation ran; the compiled program's text says which scope it
came from. XLA fuses across scopes: a fused operation counts for the scope of its result; products
with a vector, which XLA rewrites on CPU without their scope, count as "other".
"""

from __future__ import annotations

import bisect
import dataclasses
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

import qs_jax
from benchmarks import environment
from benchmarks.tables import markdown
from benchmarks.timing import Watch, watch
from qs_jax.config import GREEDY
from qs_jax.errors import exit_code
from qs_jax.files import write_whole
from qs_jax.models import Params

# A scope anywhere in an operation's path decides, the first of these first: an entropy inside a
# halting decision is a signal, and its head is not the model's. Light layers run inside another's
# attention, and their own attention is theirs.
SCOPES = ("kv_write", "amq", "signals", "halt", "fuse", "head", "light", "attn", "mlp", "embed")
COMPONENTS = {
    "embed": "embedding",
    "attn": "attention",
    "mlp": "MLP",
    "light": "light layers",
    "kv_write": "KV write",
    "amq": "quantisation",
    "fuse": "fusion logic",
    "halt": "halting decisions",
    "signals": "signals",
    "head": "head",
    "other": "everything else",
    "idle": "idle",
}
# Steps of `stream` before the trace of decoding: the prefill, and the one that packs the caches.
WARM_STEPS = 2
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?\s([a-z][\w\-]*)\(", re.MULTILINE)
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


class Program(NamedTuple):
    """A compiled program's instructions: their components and what reads their results."""

    components: dict[str, str | None]  # None for those that hold others
    readers: dict[str, set[str]]


def scope_of(path: str) -> str:
    """The component of an operation from its path of scopes, "other" if it is in none."""
    parts = path.split("/")
    return next((scope for scope in SCOPES if scope in parts), "other")


def parse_program(text: str) -> Program:
    """Components and readers of the instructions in a compiled program's text.

    Readers of an instruction that only names a result are the readers of that name. What follows
    in another round of a loop, or inside a branch, is not among them.
    """
    components: dict[str, str | None] = {}
    direct: dict[str, set[str]] = {}
    naming: set[str] = set()
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, operation, rest = match[1], match[2], line[match.end() :]
        path = _PATH.search(rest)
        components[name] = None if operation in _CONTAINERS else scope_of(path[1] if path else "")
        if operation in _NAMING:
            naming.add(name)
        for operand in _NAME.findall(rest.split(")", 1)[0]):
            direct.setdefault(operand, set()).add(name)

    def resolve(name: str) -> set[str]:
        readers = direct.get(name, set())
        return (readers - naming).union(*map(resolve, readers & naming))

    return Program(components, {name: resolve(name) for name in direct})


def attribute(intervals: Iterable[Interval], total: float) -> dict[str, float]:
    """Split the wall time of a call among components; the parts add up to `total`.

    At each moment, time goes in equal parts to the operations that run; the rest is "idle".
    """
    events = [
        event
        for start, end, component in intervals
        if end > start
        for event in ((start, 1, component), (end, -1, component))
    ]
    running: Counter[str] = Counter()
    parts: dict[str, float] = {}
    before = 0.0
    for at, change, component in sorted(events):
        for name, count in (+running).items():
            parts[name] = parts.get(name, 0.0) + (at - before) * count / running.total()
        running[component] += change
        before = at
    return {**parts, "idle": max(total - sum(parts.values()), 0.0)}


def _events(planes: Iterable[Any]) -> Iterator[Any]:
    return (event for plane in planes for line in plane.lines for event in line.events)


def _has_operations(plane: Any) -> bool:
    """Whether it is a device's, with operations of programs on it."""
    own = plane.name.startswith("/device:")
    return own and any("hlo_op" in dict(event.stats) for event in _events([plane]))


def read_intervals(planes: Iterable[Any], programs: dict[str, Program]) -> list[Interval]:
    """Operations of a trace.

    Those of a GPU are on planes of its own, and none is counted twice: planes of the host, which
    show launches, are left out then. All that a device runs for a program is work: what the text
    of the program does not explain goes by the path in the event, or to "other".

    On CPU an asynchronous one ends with an event of its own, which comes late when the thread that
    finishes it goes on with what waited for it: it is over at the latest when one that reads its
    result begins.
    """
    planes = list(planes)
    devices = [plane for plane in planes if _has_operations(plane)]
    operations = []  # of each: its program and name, the key of its end, when it ran
    ends: dict[Any, float] = {}
    starts: dict[tuple[str, str], list[float]] = {}
    for event in _events(devices or planes):
        stats = dict(event.stats)
        finish = event.start_ns + event.duration_ns
        if event.name.startswith("end: "):
            ends[stats.get("_c")] = finish
            continue
        module, name = str(stats.get("hlo_module")), str(stats.get("hlo_op"))
        component = programs[module].components.get(name) if module in programs else None
        if component is None and devices and "hlo_op" in stats:
            component = scope_of(f"{stats.get('name')}/{stats.get('tf_op')}")
        if component is not None:
            starts.setdefault((module, name), []).append(event.start_ns)
            ran = Interval(event.start_ns, finish, component)
            operations.append((module, name, stats.get("_p"), ran))
    for times in starts.values():
        times.sort()

    def bound(module: str, name: str, key: Any, ran: Interval) -> Interval:
        if key is None or module not in programs:
            return ran
        begins = [ends.get(key, ran.end)]
        for reader in programs[module].readers.get(name, ()):
            times = starts.get((module, reader), [])
            begins += times[bisect.bisect_right(times, ran.start) :][:1]
        return ran._replace(end=max(ran.end, min(begins)))

    return [bound(*operation) for operation in operations]


def profile(
    call: Callable[..., Any],
    prepare: Callable[[], tuple[Any, ...]] = tuple,
    folder: Path | None = None,
) -> dict[str, float]:
    """Seconds of one warm call of the engines by component.

    `prepare` makes its arguments, outside the trace, which goes to the folder if one is given.
    """
    with watch() as seen:
        call(*prepare())
    programs = _programs(seen)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as temporary, watch() as traced:
        arguments = prepare()
        before = traced.seconds
        with jax.profiler.trace(temporary, profiler_options=options):
            call(*arguments)
        (file,) = Path(temporary).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        intervals = read_intervals(data.planes, programs)
        if folder is not None:
            with write_whole(folder / file.parent.relative_to(temporary)) as (staged,):
                shutil.copytree(file.parent, staged)
    parts = attribute(intervals, (traced.seconds - before) * 1e9)
    return {name: value * 1e-9 for name, value in parts.items()}


def _programs(seen: Watch) -> dict[str, Program]:
    """Each program of a call by name; where two share a name, the first's instructions count."""
    programs: dict[str, Program] = {}
    for program in reversed(seen.programs):
        text = program().as_text()
        name = text.removeprefix("HloModule ").partition(",")[0]
        (components, readers), before = parse_program(text), programs.get(name, Program({}, {}))
        programs[name] = Program(before.components | components, before.readers | readers)
    return programs


def capture(
    params: Params, tokens: np.ndarray, cfg: qs_jax.Config, folder: Path
) -> dict[str, dict[str, float]]:
    """Seconds by component of a prefill, and of decoding, a step of `stream` a token.

    The traces go to "prefill" and "decode" in the folder.
    """
    short = cfg.replace(max_new_tokens=1)

    def begin() -> tuple[Iterator[Any]]:
        steps = qs_jax.stream(params, tokens, cfg)
        for _ in range(WARM_STEPS):
            next(steps)
        return (steps,)

    def decode(steps: Iterator[Any]) -> None:
        for number in range(WARM_STEPS, cfg.max_new_tokens):
            with jax.profiler.StepTraceAnnotation("decode", step_num=number):
                next(steps)

    prefill = profile(lambda: qs_jax.generate(params, tokens, short), folder=folder / "prefill")
    return {"prefill": prefill, "decode": profile(decode, begin, folder / "decode")}


def table(phases: dict[str, dict[str, float]]) -> str:
    """Milliseconds of each component, and shares of the phase, in Markdown."""
    here = [name for name in COMPONENTS if any(name in parts for parts in phases.values())]
    frame = pd.DataFrame({"scope": [f"{name} ({COMPONENTS[name]})" for name in here]})
    for phase, parts in phases.items():
        times, total = [parts.get(name, 0.0) for name in here], sum(parts.values())
        frame[f"{phase}, ms"] = [f"{time * 1e3:.2f} ({time / total:.1%})" for time in times]
    return markdown(frame)


@dataclasses.dataclass
class Arguments:
    """Capture profiler traces of prefill and decode, and say where the time went."""

    ckpt: Path
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    out: Path
    """Folder for the traces: prefill and decode get one each."""
    preset: str = "paper-bits-vocab"
    """Mechanisms to run: a name, or FILE.json. The default has all four, in both phases."""
    prompt: int = 256
    """Tokens of each of four prompts, at random."""
    new_tokens: int = 16
    """Tokens generated after it; the first two come before the trace."""


def run(args: Arguments) -> None:
    """Trace, and write and print the seconds."""
    params, model = qs_jax.load(args.ckpt)
    quicksilver = qs_jax.presets.by_name(args.preset, model)
    endless = {"max_new_tokens": args.new_tokens, "eos_token_ids": ()}
    cfg = qs_jax.Config(model, quicksilver, **endless, **GREEDY)
    params = environment.attach_maps(params, cfg, args.ckpt, args.preset)
    tokens = environment.random_tokens(model.vocab_size, 4, args.prompt)
    phases = capture(params, tokens, cfg, args.out)
    settings = {"preset": Path(args.preset).name, "dtype": model.dtype, "shape": tokens.shape}
    settings["decode_steps"] = args.new_tokens - WARM_STEPS
    content = {"settings": settings, "seconds": phases}
    environment.write("scopes", content, args.out / "scopes.json")
    print(table(phases))
    for file in sorted(args.out.rglob("*.trace.json.gz")):
        print(f"ui.perfetto.dev loads {file} (it stays in the browser).")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("trace", Arguments, run, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
