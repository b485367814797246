"""What each mechanism does to perplexity and to the counted work, on a real model and text.

`python -m benchmarks.mechanisms --ckpt DIR --text FILE` scores the first windows of a text under
every row of the tables in docs/mechanisms.md, writes benchmarks/results/mechanisms.json after each
row (a stopped run goes on where it was), and rewrites the tables. Maps and percentiles are fitted
on the windows that follow the scored ones. All savings are simulated: counted from masks.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

import qs_jax
from benchmarks import environment, mechanism_rows, mechanism_tables
from qs_jax import accounting
from qs_jax.checkpoint import read_manifest
from qs_jax.config import Config, ModelConfig
from qs_jax.evaluation.perplexity import Windows, cut_windows, score_windows, total_counts
from qs_jax.mechanisms.kv_maps import KVMaps, select
from qs_jax.models import Params


@dataclasses.dataclass
class Arguments:
    """Measure every row and rewrite the tables."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    text: Path
    """UTF-8 text, tokenised whole and cut into windows."""
    windows: int = 16
    """Windows scored."""
    seq_len: int = 512
    """Tokens a window."""
    fit_windows: int = 64
    """Windows after those, for maps and percentiles."""
    batch_size: int = 4
    """Windows at a time."""
    out: Path = environment.RESULTS / "mechanisms.json"
    """JSON file."""
    docs: tuple[Path, ...] = (Path("docs/mechanisms.md"), Path("README.md"))
    """Pages whose tables are rewritten."""
    tables_only: bool = False
    """Rewrite the tables from the JSON file, measure nothing."""


def score_row(params: Params, windows: Windows, cfg: Config, batch_size: int) -> dict[str, Any]:
    """Per-window negative log-likelihood and the savings of one configuration."""
    entries = list(score_windows(params, windows, cfg, batch_size=batch_size))
    return {
        "nll": [value for entry in entries for value in entry["nll"]],
        "tokens": [count for entry in entries for count in entry["tokens"]],
        "saved": accounting.summary(total_counts(entries)),
    }


def measure(args: Arguments) -> dict[str, Any]:
    """Score all rows, one after the other, into the JSON file."""
    params, model = qs_jax.load(args.ckpt, dtype="float32")
    ids = qs_jax.load_tokenizer(args.ckpt)(
        args.text.read_text(encoding="utf-8"), verbose=False
    ).input_ids
    scored = cut_windows(ids, args.seq_len, args.windows)
    both = cut_windows(ids, args.seq_len, args.windows + args.fit_windows)
    fitting = both.tokens_WT[args.windows :]
    about = {
        "model": read_manifest(args.ckpt)["source"],
        "text": args.text.name,
        "windows": args.windows,
        "seq_len": args.seq_len,
        "fit_windows": args.fit_windows,
        "batch_size": args.batch_size,
        "dtype": "float32",
    }
    done = environment.read(args.out, about, {"rows": {}})
    if "fitted" not in done:
        done["fitted"] = mechanism_rows.percentiles(params, fitting[:4], model)
        _write(args.out, about, done)
    rows = list(mechanism_rows.all_rows(model, done["fitted"]))
    stale = [
        row
        for row in rows
        if _settings(done["rows"].get(row.key, {}).get("quicksilver", {}))
        != _settings(row.quicksilver.to_dict())
    ]
    maps = None
    for row in tqdm(stale, "rows"):
        cfg = Config(model, row.quicksilver, protocol=row.protocol, engine="masked")
        here = params
        skip, halting = row.quicksilver.kv_skip, row.quicksilver.halting
        shipped = row.section == "presets"  # reads the maps that come with the checkpoint
        if skip is not None and skip.policy == "extrapolate" and not shipped:
            maps = maps or _maps(args, params, fitting, model)
            here = {**params, "kv_maps": select(maps, halting.layers)}
        result = score_row(here, scored, cfg, args.batch_size)
        about_row = {"quicksilver": row.quicksilver.to_dict(), "commit": environment.commit()}
        done["rows"][row.key] = result | about_row
        _write(args.out, about, done)
    done["rows"] = {row.key: done["rows"][row.key] for row in rows}
    _write(args.out, about, done)
    _maps_file(args).unlink(missing_ok=True)
    return done


def _maps_file(args: Arguments) -> Path:
    return args.out.with_suffix(".maps.safetensors")


def _maps(args: Arguments, params: Params, fitting: np.ndarray, model: ModelConfig) -> KVMaps:
    """Maps of all halting layers, kept in a file while the run lasts."""
    path = _maps_file(args)
    if not path.exists():
        layers = mechanism_rows.MAP_LAYERS
        qs_jax.fit_kv_maps(params, fitting, layers, model, progress=True).save(path)
    return KVMaps.load(path)


def _settings(quicksilver: dict[str, Any]) -> dict[str, Any]:
    """What decides a result: everything but where it comes from."""
    return {name: value for name, value in quicksilver.items() if name != "provenance"}


def _write(path: Path, about: dict[str, Any], done: dict[str, Any]) -> None:
    environment.write(path.stem, {**done, "about": about}, path)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.mechanisms", args=argv)
    if not args.tables_only:
        measure(args)
    for name, table in mechanism_tables.render(json.loads(args.out.read_text())):
        for page in args.docs:
            mechanism_tables.replace(page, name, table)
    print(f"{args.out} and the tables of {', '.join(map(str, args.docs))} are up to date.")


if __name__ == "__main__":
    main()
