"""Which words halt, which fuse, and what it does to predictions: paper Tables 2, 9, 12 and 13.

`python -m benchmarks.linguistics --ckpt DIR --treebank ZIP` scores the first windows of the Penn
Treebank sample under every configuration of docs/linguistics.md and writes
benchmarks/results/linguistics.json after each (a stopped run goes on where it was). `--text FILE`
adds a text tagged by spaCy, the paper's own set-up. With `--preset NAME` only that preset is
measured, into `--out`. All savings are simulated.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

import qs_jax
from benchmarks import environment, mechanism_rows
from benchmarks.linguistics.align import Aligned, align
from benchmarks.linguistics.measures import Pairs, fusion_layers, pair_shares, study
from benchmarks.linguistics.observe import Observed, observe
from benchmarks.linguistics.text import TaggedText, tag_text
from benchmarks.linguistics.treebank import read_treebank
from benchmarks.mechanism_rows import CONTINUATION, TEACHER, Row
from qs_jax import presets
from qs_jax.config import Config, ModelConfig, QuickSilverConfig
from qs_jax.errors import InputError, exit_code
from qs_jax.load import find_maps
from qs_jax.models import Params

_SINKS = 4  # the first positions of a window, which no preset lets fuse


@dataclasses.dataclass
class Arguments:
    """Measure halting and fusion by kinds of words."""

    ckpt: Path
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    treebank: Path | None = None
    """Zip file or folder with the Penn Treebank sample."""
    text: str | None = None
    """wikitext-103, or a file, tagged by spaCy; it has no constituents."""
    preset: str | None = None
    """Measure this preset only: a name, or FILE.json."""
    protocol: Literal["teacher-forced", "continuation"] | None = None
    """Of --preset; teacher-forced unless it can act on prompts only."""
    spacy: str = "en_core_web_sm"
    """The spaCy model that tags --text."""
    windows: int = 32
    """Windows scored of each corpus."""
    seq_len: int = 512
    """Tokens a window."""
    fit_windows: int = 4
    """Windows after those, on which thresholds by percentile are fitted."""
    batch_size: int = 2
    """Windows at a time; their logits are held at once."""
    out: Path = environment.RESULTS / "linguistics.json"
    """JSON file."""


def page_rows(model: ModelConfig, fitted: dict[str, Any], parsed: bool) -> Iterator[Row]:
    """Every configuration of the page: the paper's numbers, its percentile rules, our presets.

    Those that differ in fusion or bits only are for text with parses.
    """
    full = mechanism_rows.by_percentiles(model, fitted)
    halting = QuickSilverConfig(halting=full.halting, kv_skip=full.kv_skip)
    fusion = QuickSilverConfig(fusion=full.fusion)
    yield Row("paper", "paper", TEACHER, presets.paper(model))
    yield Row("percentiles", "percentiles, H+K", TEACHER, halting)
    if parsed:
        yield Row("percentiles", "percentiles, F", TEACHER, fusion)
        yield Row("percentiles", "percentiles, H+K+F+Q", TEACHER, full)
        yield Row("percentiles", "percentiles, H+K+F+Q", CONTINUATION, full)
    yield Row("presets", "balanced", CONTINUATION, presets.balanced(model))


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
    batches = [tokens_WT[i : i + batch_size] for i in range(0, len(tokens_WT), batch_size)]
    distances = [mechanism_rows.adjacent_distances(params, batch, model) for batch in batches]
    distances_LWT = np.concatenate(distances, axis=1)[:, :, _SINKS:]
    shares = {}
    for layer in fusion_layers(model)[:-1]:
        tau = float(np.percentile(distances_LWT[layer - 1], 15))
        window_P, at_P = np.nonzero(distances_LWT[layer - 1] < tau)
        pairs = Pairs(window_P, at_P + _SINKS, at_P + _SINKS + 1)
        shares[f"layer {layer}"] = {"tau": tau} | pair_shares(aligned, pairs)
    return shares


def measure(args: Arguments) -> dict[str, Any]:
    """Score all configurations on all corpora, one after the other, into the JSON file."""
    params, model = qs_jax.load(args.ckpt, dtype="float32")
    tokenizer = qs_jax.load_tokenizer(args.ckpt)
    about = {
        "model": environment.source_of(args.ckpt),
        "windows": args.windows,
        "seq_len": args.seq_len,
        "fit_windows": args.fit_windows,
        "batch_size": args.batch_size,
        "dtype": "float32",
        "layers": model.num_layers,
    }
    content = environment.read(args.out, about, {"corpora": {}}) | {"about": about}
    for name, words in _corpora(args):
        aligned = align(words, tokenizer, args.seq_len, args.windows)
        part = content["corpora"].setdefault(name, {"about": aligned.describe(), "rows": {}})
        if args.preset is None and "fitted" not in part:
            both = align(words, tokenizer, args.seq_len, args.windows + args.fit_windows)
            fitting_WT = both.windows.tokens_WT[args.windows :]
            if len(fitting_WT) < args.fit_windows:
                raise InputError(f"{words.name} is too short for --windows and --fit-windows.")
            part["fitted"] = mechanism_rows.percentiles(params, fitting_WT, model)
            if words.phrases is not None:
                part["criterion"] = criterion(params, aligned, model, args.batch_size)
        dense: dict[str, Observed] = {}
        for row in tqdm(_rows(args, model, part, words), name):
            if row.key in part["rows"]:
                continue
            cfg = Config(model, row.quicksilver, protocol=row.protocol, engine="masked")
            if row.protocol not in dense:
                off = cfg.replace(quicksilver=None)
                dense[row.protocol] = observe(params, aligned, off, args.batch_size)
            maps, _ = find_maps(cfg, args.ckpt, None, row.name)
            with_maps = params if maps is None else params | {"kv_maps": maps}
            observed = observe(with_maps, aligned, cfg, args.batch_size)
            result = _round_floats(study(aligned, dense[row.protocol], observed, cfg))
            settings = {"quicksilver": row.quicksilver.to_dict(), "commit": environment.commit()}
            part["rows"][row.key] = result | settings
            environment.write(args.out.stem, content, args.out)
    return content


def _corpora(args: Arguments) -> Iterator[tuple[str, TaggedText]]:
    if args.treebank is None and args.text is None:
        raise InputError("give --treebank, --text or both.")
    if args.treebank is not None:
        yield "treebank", read_treebank(args.treebank)
    if args.text is not None:
        yield "spacy", tag_text(args.text, args.spacy)


def _rows(
    args: Arguments, model: ModelConfig, part: dict[str, Any], words: TaggedText
) -> list[Row]:
    if args.preset is None:
        return list(page_rows(model, part["fitted"], words.phrases is not None))
    quicksilver = presets.by_name(args.preset, model)
    if quicksilver.is_off:
        raise InputError(f"preset {args.preset!r} has no mechanisms: nothing to measure.")
    protocol = args.protocol or (CONTINUATION if quicksilver.prompts_only else TEACHER)
    return [Row("preset", args.preset, protocol, quicksilver)]


def _round_floats(content: dict[str, Any]) -> dict[str, Any]:
    """Content as a JSON file has it, with five digits of each figure."""
    return json.loads(json.dumps(content), parse_float=lambda digits: float(f"{float(digits):.5g}"))


def main(argv: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.linguistics", args=argv)
    measure(args)
    print(f"{args.out} is up to date.")


if __name__ == "__main__":
    sys.exit(exit_code(main))
