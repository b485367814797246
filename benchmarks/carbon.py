"""Energy and emissions per token, dense against presets (paper F).

`python -m benchmarks.carbon --ckpt DIR` runs the dense model and each preset in turn (A B A C A)
under CodeCarbon (extra `carbon`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

import qs_jax
from benchmarks import environment
from benchmarks.tables import markdown, origin, percent
from benchmarks.timing import Measure, ratios, run_in_turn
from qs_jax.config import GREEDY
from qs_jax.errors import InputError, exit_code

ROWS = 4


@dataclasses.dataclass
class Arguments:
    """Measure, or estimate, the energy of the dense model and of presets."""

    ckpt: Path
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    presets: tuple[str, ...] = ("balanced",)
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


def make_tracker(country: str, cpu_watts: int | None) -> Any:
    """CodeCarbon's offline tracker; it writes and sends nothing."""
    try:
        from codecarbon import OfflineEmissionsTracker
        from codecarbon.input import DataSource
    except ImportError as error:
        raise InputError("energy is measured with CodeCarbon: install qs-jax[carbon].") from error
    if country not in DataSource().get_global_energy_mix_data():
        raise InputError(f"CodeCarbon knows no country {country!r}: give a code like USA.")
    return OfflineEmissionsTracker(
        country_iso_code=country,
        tracking_mode="process",  # where there is no counter: others may be at work
        force_cpu_power=cpu_watts,
        force_mode_cpu_load=cpu_watts is not None,
        output_methods=[],
        allow_multiple_runs=True,
        log_level="error",
    )


def read_energy(task: Any) -> dict[str, float]:
    """What `stop_task` returns, in seconds, joules and grams of CO2 equivalent."""
    parts = {f"{part}_joules": getattr(task, f"{part}_energy") for part in ("cpu", "gpu", "ram")}
    parts["joules"] = task.energy_consumed
    joules = {name: 3.6e6 * kwh for name, kwh in parts.items()}
    return joules | {"seconds": task.duration, "grams_co2": 1e3 * task.emissions}


def describe_sources(tracker: Any) -> dict[str, str]:
    """How CodeCarbon knows each part's energy; docs/profiling.md explains its words."""
    hardware, found = tracker.get_detected_hardware(), {"ram": "by its size"}
    for part in tracker._hardware:  # the tracker says it nowhere else
        if type(part).__name__ == "CPU":
            found["cpu"] = f"by {part._mode}, {part._tdp} W ({hardware['cpu_model']})"
        elif type(part).__name__ == "GPU":
            found["gpu"] = f"by the counters of {hardware['gpu_model']}"
    return found


def measure(args: Arguments) -> None:
    """Write the file and the table."""
    environment.check_out(args.out)
    tracker = make_tracker(args.country, args.cpu_watts)
    params, model = qs_jax.load(args.ckpt)
    tokens = environment.random_tokens(model.vocab_size, ROWS, args.prompt)

    def turn_of(name: str) -> Measure:
        """A turn repeats the call for some seconds; its numbers are of one call."""
        quicksilver = None if name == "dense" else qs_jax.presets.by_name(name, model)
        endless = {"max_new_tokens": args.new_tokens, "eos_token_ids": ()}
        cfg = qs_jax.Config(model, quicksilver, **endless, **GREEDY)
        own = environment.attach_maps(params, cfg, args.ckpt, name)
        qs_jax.generate(own, tokens, cfg)  # compiles

        def turn() -> dict[str, float]:
            tracker.start_task()
            began, calls = time.perf_counter(), 0
            while calls == 0 or time.perf_counter() - began < args.seconds:
                qs_jax.generate(own, tokens, cfg)
                calls += 1
            energy = read_energy(tracker.stop_task())
            return {name: value / calls for name, value in energy.items()}

        return turn

    turns = {Path(name).name: turn_of(name) for name in ("dense", *args.presets)}
    rows = run_in_turn(turns, 5, sharing=1)
    new, every = ROWS * args.new_tokens, ROWS * (args.prompt + args.new_tokens)
    about = {"model": environment.source_of(args.ckpt), "dtype": model.dtype, "batch_size": ROWS}
    about |= {name: getattr(args, name) for name in ("prompt", "new_tokens", "seconds", "country")}
    for row in rows.values():
        over = ratios(row, "joules")
        row["joules_over_dense"] = median(over)
        row["joules_over_dense_range"] = [min(over), max(over)]
        row |= {f"{name}_per_token": row[name] / every for name in ("joules", "grams_co2")}
        row["grams_co2_per_new_token"] = row["grams_co2"] / new
    result = {"about": about | {"method": describe_sources(tracker)}, "rows": rows}
    environment.write("carbon", result, args.out)
    print(table(json.loads(args.out.read_bytes())))


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
    sys.exit(exit_code(main))
