"""Ship the preset of a calibration, with its maps, and keep the search that it comes from.

`python -m benchmarks.calibrated --preset balanced.json --command "..." --data "..."` copies what
`python -m qs_jax calibrate` wrote into qs_jax/shipped (maps in float16) and writes
benchmarks/results/calibration.json, from which `benchmarks.front` and `benchmarks.paper_tables`
make their tables.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import tyro

from benchmarks import environment
from qs_jax import presets
from qs_jax.mechanisms.kv_maps import KVMaps


@dataclasses.dataclass
class Arguments:
    """Take over a calibration."""

    preset: Path
    """What calibrate wrote as --out; its maps and its search stand beside it."""
    command: str
    """The command that made it."""
    data: tuple[str, ...] = ()
    """What each text was, in words: which windows or documents of what."""
    shipped: Path = presets.SHIPPED_PRESET
    """Where the preset goes; its maps go beside it."""
    out: Path = environment.RESULTS / "calibration.json"
    """JSON file."""


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.calibrated", args=argv)
    content = json.loads(args.preset.read_text(encoding="utf-8"))
    found = args.preset.with_name(f"{args.preset.stem}.search.json")
    search = json.loads(found.read_text(encoding="utf-8"))
    search.pop("observed")  # percentiles of signals: large, and no table shows them
    shutil.copyfile(args.preset, args.shipped)
    maps = presets.maps_path(args.preset)
    if maps.exists():
        path = KVMaps.load(maps).save(presets.maps_path(args.shipped), "float16")
        path.chmod(0o644)
    result = {
        "command": args.command,
        "data": list(args.data),
        "balanced": {"verified": content["provenance"]["verified"]},
        "search": search,
    }
    environment.write(args.out.stem, result, args.out)
    print(f"{args.shipped} and {args.out} are up to date.")


if __name__ == "__main__":
    main()
