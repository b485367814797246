"""Ship a preset that `calibrate` found: `python -m benchmarks.shipped NAME FILE.json "COMMAND"`.

Puts the preset into `qs_jax/shipped`, its maps in float16 beside it, and every measurement with the
command into `benchmarks/results/calibration.json`.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import tyro

from benchmarks import environment
from benchmarks.tables import markdown, percent
from qs_jax import presets
from qs_jax.calibration.search import result_files
from qs_jax.errors import exit_code
from qs_jax.files import read_json
from qs_jax.mechanisms.kv_maps import KVMaps

FILE = environment.RESULTS / "calibration.json"


@dataclasses.dataclass
class Arguments:
    """Ship a calibrated preset."""

    name: tyro.conf.Positional[str]
    """Of `qs_jax.presets.SHIPPED`."""
    preset: tyro.conf.Positional[Path]
    """What `calibrate --out` wrote, with the files beside it."""
    command: tyro.conf.Positional[str]
    """How it was called."""


def ship(args: Arguments) -> None:
    """Copy a preset, its maps and its search."""
    preset, searched, maps = result_files(args.preset)
    content = read_json(FILE)
    content["presets"][args.name] = {"command": args.command} | read_json(searched)
    environment.write("calibration", content, FILE)
    target = presets.SHIPPED[args.name]
    shutil.copyfile(preset, target)
    if maps.exists():
        KVMaps.load(maps).save(presets.maps_path(target), "float16")


def tables(content: Mapping[str, Any]) -> dict[str, str]:
    """The walk of each search on the windows kept back, and what `balanced` was verified to do."""
    found = {
        f"calibrated {name}": [_line(entry) for entry in search["verified"]]
        for name, search in content["presets"].items()
        if name in presets.SHIPPED
    }
    lengths = content["presets"]["balanced"]["preset"]["provenance"]["verified"]["lengths"]
    found["light layers"] = [_verified(length, entry) for length, entry in lengths.items()]
    return {name: markdown(pd.DataFrame(lines)) for name, lines in found.items()}


def _verified(length: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """What a preset was verified to cost and save at one length."""
    return {
        "tokens": f"{int(length):,}",
        "perplexity change": f"{entry['ppl_increase']:+.2f}",
        "upper bound": f"{entry['upper_bound']:+.2f}",
        "passkeys lost": f"{entry['retrieval']['lost']} of {entry['retrieval']['prompts']}",
        "exact FLOPs saved": percent(entry["prompt_exact_flops_saved"]),
        "time saved": percent(entry["measured_time_saved"]),
    }


def _line(entry: Mapping[str, Any]) -> dict[str, str]:
    lost = entry.get("retrieval", {}).get("lost")
    return {
        "tokens": f"{entry.get('seq_len', 512):,}",
        "exempt at the end": str(entry.get("recent_tokens", 32)),
        "perplexity": f"{entry['ppl_increase']:+.2f}",
        "bound": f"{entry['upper_bound']:+.2f}",
        "same next token": percent(entry["agreement"]),
        "passkeys lost": "" if lost is None else str(lost),
        "prompt FLOPs saved": percent(entry["prompt_exact_flops_saved"]),
        "KV bytes saved": percent(entry["kv_bytes_saved"]),
        "kept": "yes" if entry["within_budget"] else "**no**",
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    ship(tyro.cli(Arguments, prog="python -m benchmarks.shipped", args=argv))


if __name__ == "__main__":
    sys.exit(exit_code(main))
