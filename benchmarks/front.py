"""What the extrapolation maps may read, and through how narrow a code: what each buys.

`python -m benchmarks.front --ckpt DIR --text wiki.valid.raw` fits the maps of every variant from
one dense pass, scores prompts halted in stages with each, and writes benchmarks/results/front.json
and the tables of docs/calibration.md: its own, and that of results/calibration.json, which holds
the search that `balanced` comes from. The masked engine scores: savings are simulated.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

import qs_jax
from benchmarks import environment
from benchmarks.mechanism_tables import replace
from qs_jax.calibration import paired
from qs_jax.checkpoint import read_manifest
from qs_jax.config import HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.engine.fit_maps import accumulate
from qs_jax.evaluation.perplexity import cut_windows
from qs_jax.mechanisms.kv_maps import FEATURES, select

# Features and width of the code; None maps from the features themselves.
VARIANTS = (
    (("state",), None),
    (("state", "embedding"), None),
    (("state", "embedding", "previous"), None),
    (("state", "embedding", "previous"), 512),
    (("state", "embedding", "neurons"), None),
    (FEATURES, None),
    (FEATURES, 512),
    (FEATURES, 256),
    (FEATURES, 128),
)
STAGES = (((15, 0.5), (21, 1.0)), ((21, 1.0),))


@dataclasses.dataclass
class Arguments:
    """Score halted prompts with the maps of every variant."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """Folder written by convert.hf_to_flax."""
    text: Path = Path("wiki.valid.raw")
    """UTF-8 text."""
    out: Path = environment.RESULTS / "front.json"
    """JSON file."""
    windows: int = 12
    """Windows to score."""
    fit_windows: int = 96
    """Windows after those, to fit the maps on."""
    seq_len: int = 512
    """Tokens of each window."""
    batch_size: int = 4
    """Windows at a time."""
    page: Path = Path("docs/calibration.md")
    """Page whose table is rewritten."""
    tables_only: bool = False
    """Rewrite the table from the JSON file, measure nothing."""


def staged(stages: tuple[tuple[int, float], ...]) -> QuickSilverConfig:
    """Shares of the prompt that have stopped after each of some layers, keys extrapolated."""
    layers, quota = zip(*stages, strict=True)
    return QuickSilverConfig(
        halting=HaltingConfig(rule="quota", layers=layers, quota=quota, entropy=None),
        kv_skip=KVSkipConfig("extrapolate"),
    )


def measure(args: Arguments) -> dict[str, Any]:
    """Score every variant at every stage."""
    params, model = qs_jax.load(args.ckpt, dtype="float32")
    ids = qs_jax.load_tokenizer(args.ckpt)(
        args.text.read_text(encoding="utf-8"), verbose=False
    ).input_ids
    windows = cut_windows(ids, args.seq_len, args.windows + args.fit_windows).tokens_WT
    scored_WT, fitting_WT = windows[: args.windows], windows[args.windows :]
    layers = tuple(sorted({layer for stages in STAGES for layer, _ in stages}))
    moments = accumulate(
        params, fitting_WT, layers, model, features=FEATURES, data=args.text.name, progress=True
    )
    plain = qs_jax.Config(model, protocol="continuation", engine="masked")
    dense = paired.score_tokens(params, scored_WT, plain, args.batch_size)
    about = {
        "model": read_manifest(args.ckpt)["source"],
        "text": args.text.name,
        "windows": args.windows,
        "seq_len": args.seq_len,
        "fit_tokens": moments.provenance["tokens"],
        "dtype": "float32",
        "dense_perplexity": dense.perplexity,
        "commit": environment.commit(),
    }
    rows: list[dict[str, Any]] = []
    for features, rank in tqdm(VARIANTS, "variants"):
        maps = moments.solve(features, rank=rank)
        for stages in STAGES:
            qs = staged(stages)
            assert qs.halting is not None
            assert qs.halting.layers is not None
            here = {**params, "kv_maps": select(maps, qs.halting.layers)}
            found = paired.score_tokens(
                here, scored_WT, plain.replace(quicksilver=qs), args.batch_size
            )
            rows.append(
                {
                    "features": features,
                    "rank": rank,
                    "stages": stages,
                    "ppl_increase": paired.ppl_increase(found, dense),
                    "upper_bound": paired.upper_bound(found, dense, 0.95),
                    "exact_flops_saved": found.saved["prefill"]["exact_flops_saved"],
                    "layer_tokens_saved": found.saved["prefill"]["layer_tokens_saved"],
                }
            )
            environment.write(args.out.stem, {"about": about, "rows": rows}, args.out)
    return {"about": about, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """A line for each variant, the stages side by side."""
    rows = results["rows"]
    stages = list(dict.fromkeys(json.dumps(row["stages"]) for row in rows))
    told = [
        ", then ".join(f"{share:.0%} at {layer}" for layer, share in json.loads(stage))
        for stage in stages
    ]
    head = ["read of a token", "code", *(f"{t}: perplexity | exact FLOPs saved" for t in told)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (1 + 2 * len(stages))]
    for variant in dict.fromkeys((tuple(row["features"]), row["rank"]) for row in rows):
        cells = [", ".join(variant[0]), "none" if variant[1] is None else str(variant[1])]
        for stage in stages:
            for row in rows:
                same = (tuple(row["features"]), row["rank"]) == variant
                if same and json.dumps(row["stages"]) == stage:
                    cells += [f"{row['ppl_increase']:+.2f}", f"{row['exact_flops_saved']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    about = results["about"]
    lines += [
        "",
        f"{about['model']}, {about['dtype']}; {about['windows']} windows of {about['seq_len']} of "
        f"{about['text']}, the last 128 tokens scored (dense {about['dense_perplexity']:.2f}); "
        f"maps fitted on {about['fit_tokens']:,} tokens after them; savings are of the prompt, "
        f"simulated; commit {about['commit']}.",
    ]
    return "\n".join(lines)


def verified_table(results: dict[str, Any]) -> str:
    """The walk along the front on windows it was not chosen on, the safest candidate first."""
    walk = results["search"]["verified"]
    others = list(walk[0].get("also", {}))
    names = [results["balanced"]["verified"]["data"], *others]
    lines = [
        "| levels | "
        + " | ".join(f"{name}: perplexity, upper bound" for name in names)
        + " | layer-tokens | exact FLOPs of the prompt | kept |",
        "|---|" + "---:|" * (len(names) + 3),
    ]
    for entry in walk:
        told = [entry, *(entry["also"][name] for name in others)]
        cells = [f"{x['ppl_increase']:+.2f}, {x['upper_bound']:+.2f}" for x in told]
        cells += [f"{entry['layer_tokens_saved']:.1%}", f"{entry['prompt_exact_flops_saved']:.1%}"]
        cells.append("yes" if entry["within_budget"] else "**no**")
        lines.append(f"| {entry['levels']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"`{results['command']}`"])


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.front", args=argv)
    if not args.tables_only:
        measure(args)
    if args.out.exists():
        replace(args.page, "front", table(json.loads(args.out.read_text(encoding="utf-8"))))
    found = environment.RESULTS / "calibration.json"
    if found.exists():
        content = json.loads(found.read_text(encoding="utf-8"))
        replace(args.page, "calibrated", verified_table(content))
    print(f"the tables of {args.page} are up to date.")


if __name__ == "__main__":
    main()
