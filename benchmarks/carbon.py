"""Energy and emissions per token, dense against presets (paper F).

`python -m benchmarks.carbon --ckpt DIR` runs the dense model and each preset in turn (A B A C A)
and rewrites the table in docs/profiling.md. It needs the extra `carbon`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

import qs_jax
from benchmarks import environment
from benchmarks.tables import markdown, origin, percent, replace_tables
from benchmarks.timing import Measure, ratios, run_in_turn
from qs_jax.accounting.carbon import Meter
from qs_jax.checkpoint import read_manifest

PAGE = Path("docs/profiling.md")
ROWS = 4


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
    prompt: int = 512
    """Tokens of each of four prompts, at random."""
    new_tokens: int = 32
    """Tokens generated after it."""
    seconds: float = 10.0
    """Each of five turns repeats the call for this long at least."""
    out: Path = environment.RESULTS / "carbon.json"
    """JSON file."""


def measure(args: Arguments) -> None:
    """Write the file and the table."""
    meter = Meter(args.country, cpu_watts=args.cpu_watts)
    params, model = qs_jax.load(args.ckpt)
    tokens = environment.random_tokens(model.vocab_size, ROWS, args.prompt)

    def turn_of(name: str) -> Measure:
        """A turn repeats the call for some seconds; its numbers are of one call."""
        quicksilver = None if name == "dense" else qs_jax.presets.by_name(name, model)
        cfg = qs_jax.Config(model, quicksilver, max_new_tokens=args.new_tokens, eos_token_ids=())
        own = environment.attach_maps(params, cfg, args.ckpt, name)
        qs_jax.generate(own, tokens, cfg)  # compiles
        calls = 0

        def repeat() -> None:
            nonlocal calls
            began, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - began < args.seconds:
                qs_jax.generate(own, tokens, cfg)
                calls += 1

        def turn() -> dict[str, float]:
            energy = dataclasses.asdict(meter.measure(repeat))
            return {name: value / calls for name, value in energy.items()}

        return turn

    turns = {name: turn_of(name) for name in ("dense", *args.presets)}
    rows = run_in_turn(turns, 5, sharing=1)
    new, every = ROWS * args.new_tokens, ROWS * (args.prompt + args.new_tokens)
    about = {"model": read_manifest(args.ckpt)["source"], "dtype": model.dtype, "batch_size": ROWS}
    about |= {"prompt": args.prompt, "new_tokens": args.new_tokens, "seconds": args.seconds}
    about |= {"country": args.country, "method": meter.method}
    for row in rows.values():
        over = ratios(row, "joules")
        row["joules_over_dense"] = median(over)
        row["joules_over_dense_range"] = [min(over), max(over)]
        for name in ("joules", "grams_co2"):
            row[f"{name}_per_token"] = row[name] / every
        row["grams_co2_per_new_token"] = row["grams_co2"] / new
    result = {"about": about, "rows": {Path(name).name: row for name, row in rows.items()}}
    environment.write("carbon", result, args.out)
    replace_tables(PAGE, {"carbon": table(json.loads(args.out.read_text()))})


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown, and what they were made with."""
    lines = []
    for name, entry in result["rows"].items():
        low, high = entry.get("joules_over_dense_range", (1.0, 1.0))
        over = f"{entry.get('joules_over_dense', 1.0):.3f}"
        line = {"": name, "J per token": f"{entry['joules_per_token']:.4f}"}
        line["of it CPU"] = percent(entry["cpu_joules"] / entry["joules"])
        line["over dense (range)"] = over if low == high else f"{over} ({low:.3f} to {high:.3f})"
        line["mg CO2e per token"] = f"{entry['grams_co2_per_token'] * 1e3:.4g}"
        line["mg CO2e per new token"] = f"{entry['grams_co2_per_new_token'] * 1e3:.4g}"
        lines.append(line | {"s per call": f"{entry['seconds']:.2f}"})
    about = result["about"]
    how = [f"{part.upper()} {method}" for part, method in about["method"].items()]
    return f"{markdown(pd.DataFrame(lines))}\n\n{origin(result, *how, about['country'])}"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("carbon", Arguments, measure, argv)


if __name__ == "__main__":
    main()
