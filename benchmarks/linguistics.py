"""Which words halt, which fuse, and what it does to predictions: paper Tables 2, 9, 12 and 13.

`python -m benchmarks.linguistics --ckpt DIR --treebank ZIP` scores the first windows of the Penn
Treebank sample under every row of the tables in docs/linguistics.md, writes
benchmarks/results/linguistics.json after each row (a stopped run goes on where it was), and
rewrites the tables. `--text FILE` adds a text tagged by spaCy, the paper's own set-up. Thresholds
by percentile are fitted on the windows that follow the scored ones. All savings are simulated.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

import qs_jax
from benchmarks import environment, linguistics_tables, mechanism_rows
from benchmarks.mechanism_rows import CONTINUATION, TEACHER, Row
from benchmarks.tables import replace_tables
from qs_jax import presets
from qs_jax.checkpoint import read_manifest
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.evaluation.linguistics import (
    Aligned,
    Observed,
    align,
    describe,
    observe,
    read_treebank,
    study,
    tag_text,
    together,
)
from qs_jax.evaluation.linguistics.constituents import Constituents
from qs_jax.evaluation.linguistics.measures import Pairs, pair_shares
from qs_jax.evaluation.linguistics.study import fusion_layers
from qs_jax.models import Params

_SINKS = 4  # the first positions of a window, which no preset lets fuse


@dataclasses.dataclass
class Arguments:
    """Measure every row and rewrite the tables."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    treebank: Path
    """Zip file or folder with the Penn Treebank sample; the tag maps are beside it."""
    text: Path | None = None
    """Also measure halting on this text, tagged by spaCy."""
    spacy: str = "en_core_web_sm"
    """Its spaCy model."""
    windows: int = 32
    """Windows scored of each corpus."""
    seq_len: int = 512
    """Tokens a window."""
    fit_windows: int = 4
    """Windows after those, for the percentiles."""
    batch_size: int = 2
    """Windows at a time."""
    out: Path = environment.RESULTS / "linguistics.json"
    """JSON file."""
    docs: Path = Path("docs/linguistics.md")
    """Page whose tables are rewritten."""
    tables_only: bool = False
    """Rewrite the tables from the JSON file, measure nothing."""


def rows(model: ModelConfig, fitted: dict[str, Any], parsed: bool) -> Iterator[Row]:
    """Every configuration: the paper's numbers, its percentile rules, and our presets.

    Those that differ in fusion or bits only are for text with parses.
    """
    full = mechanism_rows.by_percentiles(model, fitted)
    none = QuickSilverConfig()
    halting = dataclasses.replace(none, halting=full.halting, kv_skip=full.kv_skip)
    fusion = dataclasses.replace(none, fusion=full.fusion)
    yield Row("paper", "paper", TEACHER, presets.paper(model))
    yield Row("percentiles", "percentiles, H+K", TEACHER, halting)
    if parsed:
        yield Row("percentiles", "percentiles, F", TEACHER, fusion)
        yield Row("percentiles", "percentiles, H+K+F+Q", TEACHER, full)
        yield Row("percentiles", "percentiles, H+K+F+Q", CONTINUATION, full)
    yield Row("presets", "balanced", CONTINUATION, presets.balanced(model))
    yield Row("presets", "aggressive", CONTINUATION, presets.aggressive(model))


def criterion(
    params: Params, aligned: Aligned, model: ModelConfig, batch_size: int
) -> dict[str, Any]:
    """The paper's fusion criterion alone, on the dense model's states (N, D.3).

    Pairs of adjacent tokens whose raw distance after a layer is below the 15th percentile of that
    layer; nothing has fused or halted before.

    Returns:
      For each of the paper's layers, the threshold and the entry of `pair_shares`.
    """
    tokens_WT = aligned.windows.tokens_WT
    starts = range(0, len(tokens_WT), batch_size)
    found = [
        mechanism_rows.adjacent_distances(params, tokens_WT[at : at + batch_size], model)
        for at in starts
    ]
    distances_LWT = np.concatenate(found, axis=1)[:, :, _SINKS:]
    constituents = Constituents.of(aligned.text)
    told = {}
    for layer in fusion_layers(model)[:-1]:
        tau = float(np.percentile(distances_LWT[layer - 1], 15))
        window_P, at_P = np.nonzero(distances_LWT[layer - 1] < tau)
        pairs = Pairs(window_P, at_P + _SINKS, at_P + _SINKS + 1)
        told[f"layer {layer}"] = {"tau": tau} | pair_shares(aligned, constituents, pairs)
    return told


def measure(args: Arguments) -> None:
    """Score all rows of all corpora, one after the other, into the JSON file."""
    params, model = qs_jax.load(args.ckpt, dtype="float32")
    tokenizer = qs_jax.load_tokenizer(args.ckpt)
    about = {
        "model": read_manifest(args.ckpt)["source"],
        "windows": args.windows,
        "seq_len": args.seq_len,
        "fit_windows": args.fit_windows,
        "batch_size": args.batch_size,
        "dtype": "float32",
        "layers": model.num_layers,
    }
    done = environment.read(args.out, about, {"corpora": {}})
    corpora = {"treebank": lambda: read_treebank(args.treebank)}
    if args.text is not None:
        text, spacy = args.text, args.spacy
        corpora["spacy"] = lambda: tag_text(text, spacy)
    for name, read in corpora.items():
        words = read()
        aligned = align(words, tokenizer, args.seq_len, args.windows)
        both = align(words, tokenizer, args.seq_len, args.windows + args.fit_windows)
        fitting_WT = both.windows.tokens_WT[args.windows :]
        if len(fitting_WT) < args.fit_windows:
            raise SystemExit(f"{words.name} is too short for --windows and --fit-windows.")
        told = describe(aligned)
        if name == "spacy":
            told["tagger"] = f"{args.spacy} {importlib.metadata.version(args.spacy)}"
        part = done["corpora"].setdefault(name, {"about": told, "rows": {}})
        if "fitted" not in part:
            part["fitted"] = mechanism_rows.percentiles(params, fitting_WT, model)
        if words.phrases is not None and "criterion" not in part:
            part["criterion"] = criterion(params, aligned, model, args.batch_size)
        _measure_rows(params, aligned, model, part, args, lambda: _write(args.out, about, done))


def _measure_rows(
    params: Params,
    aligned: Aligned,
    model: ModelConfig,
    part: dict[str, Any],
    args: Arguments,
    keep,
) -> None:
    dense: dict[str, Observed] = {}

    def run(quicksilver: QuickSilverConfig | None, protocol: str) -> tuple[Config, Observed]:
        cfg = Config(model, quicksilver, protocol=protocol, engine="masked")
        return cfg, together(list(observe(params, aligned, cfg, batch_size=args.batch_size)))

    every = list(rows(model, part["fitted"], aligned.text.phrases is not None))
    for row in tqdm(every, aligned.text.name):
        if row.key in part["rows"]:
            continue
        if row.protocol not in dense:
            dense[row.protocol] = run(None, row.protocol)[1]
        cfg, observed = run(row.quicksilver, row.protocol)
        told = study(aligned, dense[row.protocol], observed, cfg)
        for schemes in told["prediction"].values():
            for scheme in ("universal", "auxiliary"):  # keep the file small
                del schemes[scheme]
        made = {"quicksilver": row.quicksilver.to_dict(), "commit": environment.commit()}
        part["rows"][row.key] = _rounded(told) | made
        keep()


def _rounded(value: Any) -> Any:
    """Five significant digits, which is more than any table shows."""
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _write(path: Path, about: dict[str, Any], done: dict[str, Any]) -> None:
    environment.write(path.stem, {**done, "about": about}, path)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.linguistics", args=argv)
    if not args.tables_only:
        measure(args)
    replace_tables(args.docs, dict(linguistics_tables.render(json.loads(args.out.read_text()))))
    print(f"{args.out} and the tables of {args.docs} are up to date.")


if __name__ == "__main__":
    main()
