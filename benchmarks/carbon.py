"""Energy and emissions per token, dense against presets (paper F).

`python -m benchmarks.carbon --ckpt DIR` runs the dense model and each preset in turn (A B A C A),
writes benchmarks/results/carbon.json, and rewrites the table in docs/profiling.md. It needs the
extra `carbon`. The table says whether energy was measured by counters or estimated.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import tyro
from tqdm import tqdm

import qs_jax
from benchmarks import environment, mechanism_tables
from qs_jax import presets
from qs_jax.accounting.carbon import Energy, Meter
from qs_jax.checkpoint import read_manifest
from qs_jax.commands.maps import find_maps
from qs_jax.errors import InputError, QuickSilverError

DENSE = "dense"


@dataclasses.dataclass
class Arguments:
    """Measure, or estimate, the energy of the dense model and of presets."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    presets: tuple[str, ...] = ("balanced", "aggressive")
    """What to compare with the dense model."""
    country: str = "USA"
    """ISO code of three letters; its mean carbon intensity counts."""
    cpu_watts: int | None = None
    """Power of the processor at full load, where it is known and has no counters."""
    batch_size: int = 4
    """Rows."""
    prompt: int = 512
    """Tokens of each prompt, at random."""
    new_tokens: int = 32
    """Tokens generated after it."""
    rounds: int = 5
    """Turns of each preset."""
    seconds: float = 10.0
    """Each turn repeats the call for this long at least."""
    dtype: str | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""
    out: Path = environment.RESULTS / "carbon.json"
    """JSON file."""
    docs: Path = Path("docs/profiling.md")
    """Page whose table is rewritten."""


class Measures(Protocol):
    """What `interleave` needs of a meter."""

    def measure(self, call: Callable[[], Any]) -> Energy:
        """Energy of one call."""
        ...


def turn(meter: Measures, call: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Repeat a call for some seconds and measure them all.

    Returns:
      The fields of `Energy` for one call, and "calls", how many there were.
    """
    calls = 0

    def repeat() -> None:
        nonlocal calls
        began = time.perf_counter()
        while calls == 0 or time.perf_counter() - began < seconds:
            call()
            calls += 1

    energy = dataclasses.asdict(meter.measure(repeat))
    return {name: value / calls for name, value in energy.items()} | {"calls": float(calls)}


def interleave(
    meter: Measures, calls: dict[str, Callable[[], Any]], rounds: int, seconds: float
) -> dict[str, list[dict[str, Any]]]:
    """Turns of every call, each between two turns of the dense model: A B A C A.

    Args:
      meter: Measures energy.
      calls: By name, `DENSE` among them.
      rounds: Turns of each.
      seconds: Of a turn, at least.

    Returns:
      Turns by name; of a preset, with "joules_over_dense", its joules over the mean of the dense
      turns before and after it.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in calls}
    names = [name for name in calls if name != DENSE]
    before = turn(meter, calls[DENSE], seconds)
    found[DENSE].append(before)
    for name in tqdm(names * rounds, "turns"):
        own = turn(meter, calls[name], seconds)
        after = turn(meter, calls[DENSE], seconds)
        around = (before["joules"] + after["joules"]) / 2
        found[name].append(own | {"joules_over_dense": own["joules"] / around})
        found[DENSE].append(after)
        before = after
    return found


def row(turns: list[dict[str, Any]], tokens: int, new_tokens: int) -> dict[str, Any]:
    """Medians over the turns of a call.

    Args:
      turns: Of `interleave`.
      tokens: Prompt and new tokens of a call.
      new_tokens: New tokens of a call: what the paper divides by (F.1).
    """

    def middle(name: str) -> float:
        return median(entry[name] for entry in turns)

    out: dict[str, Any] = {
        "joules": middle("joules"),
        "cpu_joules": middle("cpu_joules"),
        "ram_joules": middle("ram_joules"),
        "gpu_joules": middle("gpu_joules"),
        "seconds": middle("seconds"),
        "joules_per_token": middle("joules") / tokens,
        "grams_co2_per_token": middle("grams_co2") / tokens,
        "grams_co2_per_new_token": middle("grams_co2") / new_tokens,
        "turns": turns,
    }
    if "joules_over_dense" in turns[0]:
        ratios = [entry["joules_over_dense"] for entry in turns]
        out["joules_over_dense"] = median(ratios)
        out["joules_over_dense_range"] = [min(ratios), max(ratios)]
    return out


def measure(args: Arguments, meter: Meter) -> dict[str, Any]:
    """Everything the result file holds but its environment.

    Raises:
      InputError: Nothing to compare, or no time to do it in.
    """
    if args.rounds < 1 or not args.presets:
        raise InputError("give at least one preset and one round.")
    params, model = qs_jax.load(args.ckpt, dtype=args.dtype)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (args.batch_size, args.prompt), np.int32)

    def call_of(name: str) -> Callable[[], Any]:
        quicksilver = None if name == DENSE else presets.by_name(name, model)
        cfg = qs_jax.Config(model, quicksilver, max_new_tokens=args.new_tokens, eos_token_ids=())
        maps, _ = find_maps(cfg, args.ckpt, None, name)
        own = params if maps is None else params | {"kv_maps": maps}
        return lambda: qs_jax.generate(own, tokens, cfg)

    calls = {name: call_of(name) for name in (DENSE, *args.presets)}
    for call in calls.values():
        call()  # compiles
    turns = interleave(meter, calls, args.rounds, args.seconds)
    new = args.batch_size * args.new_tokens
    every = args.batch_size * args.prompt + new
    return {
        "about": {
            "model": read_manifest(args.ckpt)["source"],
            "dtype": model.dtype,
            "batch_size": args.batch_size,
            "prompt": args.prompt,
            "new_tokens": args.new_tokens,
            "rounds": args.rounds,
            "seconds_a_turn": args.seconds,
            "country": meter.country,
            "method": meter.method,
        },
        "rows": {Path(name).name: row(found, every, new) for name, found in turns.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown, and how they came about."""
    about, made = result["about"], result["environment"]
    head = ["", "J per token", "of it CPU", "over dense (range)", "mg CO2e per token"]
    head += ["mg CO2e per new token", "s per call"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, entry in result["rows"].items():
        over = "1"
        if "joules_over_dense" in entry:
            low, high = entry["joules_over_dense_range"]
            over = f"{entry['joules_over_dense']:.3f} ({low:.3f} to {high:.3f})"
        cells = [
            name,
            f"{entry['joules_per_token']:.4f}",
            f"{entry['cpu_joules'] / entry['joules']:.0%}",
            over,
            f"{entry['grams_co2_per_token'] * 1e3:.4g}",
            f"{entry['grams_co2_per_new_token'] * 1e3:.4g}",
            f"{entry['seconds']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    method = "; ".join(f"{part.upper()} {told}" for part, told in about["method"].items())
    lines += [
        "",
        f"{method}. Medians of {about['rounds']} turns of {about['seconds_a_turn']:g} s, each "
        f"between two dense ones; {about['batch_size']} x {about['prompt']} tokens and "
        f"{about['new_tokens']} new ones, {about['dtype']}, carbon intensity of "
        f"{about['country']}; {about['model']}, {made['processor']}, {made['cores']} cores, jax "
        f"{made['packages']['jax']}, commit {made['commit']}.",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.carbon", args=argv)
    try:
        meter = Meter(args.country, cpu_watts=args.cpu_watts)
        result = measure(args, meter)
    except QuickSilverError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    environment.write("carbon", result, args.out)
    if args.docs.exists():
        mechanism_tables.replace(args.docs, "carbon", table(json.loads(args.out.read_text())))
    print(f"{args.out} is written, and the table of {args.docs}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
