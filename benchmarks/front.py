"""The front of prompt halting: perplexity lost against FLOPs and seconds saved.

`python -m benchmarks.front --ckpt DIR --data FILE` scores the first windows of a text under every
way of leaving prompt work out, by KL divergence from the dense model, and measures the time of a
prefill against the dense one in turn. What is in the JSON file with the same settings is not scored
again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from benchmarks import environment
from benchmarks.mechanisms import Inputs
from benchmarks.pictures import COLORS, INK, picture
from benchmarks.tables import markdown, percent
from qs_jax import presets
from qs_jax.calibration import climb
from qs_jax.calibration.fit_maps import fit_kv_maps
from qs_jax.calibration.scores import score_tokens
from qs_jax.config import Config, HaltingConfig, KVSkipConfig, ModelConfig, QuickSilverConfig
from qs_jax.errors import exit_code
from qs_jax.files import read_json, write_json
from qs_jax.mechanisms.kv_maps import FEATURES, KVMaps, feature_count, select
from qs_jax.models import Params

# Shares of a prompt that have stopped, by shares of the depth; maps are fitted for these layers.
SCHEDULES = ({0.8: 1.0}, {2 / 3: 0.5, 0.8: 0.75, 0.87: 1.0}, {0.7: 1.0}, {0.5: 0.5, 0.7: 1.0})
CLAIM = (39.6, 0.2)  # the paper: FLOPs saved in its own account, %, perplexity lost
RANK, RUNS = 512, 5
# Families: what the picture calls them, and how they are drawn.
STYLES = {
    "light": ("light layers, then keys from maps", "o"),
    "skip": ("stop, keys skipped (the paper)", "v"),
    "maps": ("stop, keys from maps", "s"),
    "propagate": ("stop, keys from the frozen state", "^"),
    "random, skip": ("random tokens stop, keys skipped", "x"),
}


@dataclasses.dataclass
class Arguments(Inputs):
    """Score every way."""

    out: Path = environment.RESULTS / "prompt_front.json"
    """JSON file, and the cache."""
    presets: tuple[Path, ...] = ()
    """More presets of `calibrate`, with their maps beside them: other budgets."""


class Way(NamedTuple):
    """One preset of a family, with its maps; it is a family of one candidate to `climb`."""

    policy: str
    name: str
    quicksilver: QuickSilverConfig
    maps: KVMaps | None

    def preset(self, levels: Any, *, lean: bool = False) -> QuickSilverConfig:
        """The preset."""
        del levels, lean
        return self.quicksilver

    def params(self, params: Params, levels: Any, qs: QuickSilverConfig) -> Params:
        """The parameters with its maps, and no others."""
        del levels, qs
        kept = {name: part for name, part in params.items() if name != "kv_maps"}
        return kept if self.maps is None else {**kept, "kv_maps": self.maps}


def schedules(model: ModelConfig) -> list[HaltingConfig]:
    """The schedules, by layers."""
    return [presets.quota(model, shares) for shares in SCHEDULES]


def ways(model: ModelConfig, fitted: KVMaps, calibrated: Sequence[Path] = ()) -> Iterator[Way]:
    """Every preset that is scored; those `calibrated` after `balanced`."""
    if path := presets.shipped_maps(model):
        yield Way("light", "balanced", presets.balanced(model), KVMaps.load(path))
    for path in calibrated:
        maps = KVMaps.load(presets.maps_path(path))
        yield Way("light", path.stem, presets.load(path, model), maps)
    for halting in schedules(model):
        layers, shares = halting.layers or (), halting.quota
        name = ", ".join(f"{share:.0%} at {at}" for at, share in zip(layers, shares, strict=True))
        for policy in ("extrapolate", "skip", "propagate"):
            maps = select(fitted, layers) if policy == "extrapolate" else None
            family = "maps" if maps is not None else policy
            qs = QuickSilverConfig(halting, KVSkipConfig(policy))
            yield Way(family, name, qs, maps)
        if min(shares) < 1:  # who stops first is chosen by chance
            chance = dataclasses.replace(halting, score="random")
            qs = QuickSilverConfig(chance, KVSkipConfig("skip"))
            yield Way("random, skip", name, qs, None)


def measure(args: Arguments) -> None:
    """Score what is not in the file yet, and write it after each row."""
    params, model, tokens_WT, about = args.read("auto")
    content: dict[str, Any] = read_json(args.out) if args.out.exists() else {"rows": {}}
    content |= {"about": about, "environment": environment.describe()}
    scored_WT, fit_WT = tokens_WT[: args.windows], tokens_WT[args.windows :]
    layers = sorted({layer for each in schedules(model) for layer in each.layers or ()})
    rank = min(RANK, feature_count(FEATURES, model) - 1)
    given: dict[str, Any] = {"features": FEATURES, "rank": rank, "data": about["text"]}
    fitted = fit_kv_maps(params, fit_WT, layers, model, progress=True, **given)
    scored = args.seq_len // 4
    cfg = Config(model, protocol="continuation", continuation_tokens=scored)
    dense = score_tokens(params, scored_WT, cfg, args.batch_size)
    asked: tuple[Any, ...] = (1.0, "exact_flops", args.batch_size, (about["text"],))
    task = climb.Task(params, cfg, scored_WT, dense, *asked)
    for way in tqdm(list(ways(model, fitted, args.presets)), "rows"):
        key, settings = f"{way.policy}: {way.name}", way.quicksilver.to_dict() | about
        settings.pop("provenance")
        if content["rows"].get(key, {}).get("settings") == json.loads(json.dumps(settings)):
            continue
        point = climb.point(task, way, (0,))
        time_saved = climb.time_saved(task, way, (0,), way.quicksilver, RUNS)
        row = {"family": way.policy, "name": way.name, "lost_by_kl": point.cost}
        row |= {"ppl_increase": point.ppl_increase, "agreement": point.agreement}
        row |= {"saved": point.saved["prompt_exact_flops_saved"], "time_saved": time_saved}
        content["rows"][key] = row | {"settings": settings}
        write_json(args.out, content)
    write_json(args.out, content | {"dense_perplexity": dense.perplexity})


def draw(content: dict[str, Any], path: Path) -> None:
    """Perplexity lost against the share of a prompt's time that is saved."""
    with picture(path, 6.6, 4.2) as axes:
        for number, (family, (label, style)) in enumerate(STYLES.items()):
            rows = [row for row in content["rows"].values() if row["family"] == family]
            rows = sorted((r for r in rows if r["time_saved"]), key=lambda r: r["time_saved"])
            x, y = [100 * r["time_saved"] for r in rows], [r["ppl_increase"] for r in rows]
            color = COLORS[number]
            axes.plot(x, y, style, label=label, color=color, markersize=5, linewidth=1)
        marks = [("the paper's claim,\nin FLOPs, by its own count", *CLAIM, "*", INK)]
        if best := content["rows"].get("light: balanced"):
            place = 100 * best["time_saved"], best["ppl_increase"]
            marks.append(("balanced", *place, "o", COLORS[0]))
        for name, x, y, marker, color in marks:
            axes.plot(x, y, marker, color=color, markersize=11)
            below = {"xytext": (0, -12), "textcoords": "offset points", "va": "top"}
            axes.annotate(name, (x, y), ha="center", **below)
        axes.axhline(0.2, color=INK, linewidth=0.8, linestyle=":")
        axes.set(
            xlabel="time of the prompt saved, %   (right and down is better)",
            ylabel="perplexity increase",
        )
        axes.set(yscale="log", xlim=(5, 46), ylim=(0.05, 15))
        axes.set_yticks([0.1, 0.2, 1, 10], ["0.1", "0.2", "1", "10"])
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8)


def tables(content: dict[str, Any]) -> dict[str, str]:
    """The rows as a table, by family and saving."""
    order = list(STYLES)
    rows = sorted(content["rows"].values(), key=lambda r: (order.index(r["family"]), r["saved"]))
    rows = [row for row in rows if row["family"] in ("light", "maps", "skip")]
    frame = pd.DataFrame(
        {
            "way": [row["family"] for row in rows],
            "stops": [row["name"] for row in rows],
            "FLOPs saved": [percent(row["saved"]) for row in rows],
            "time saved": [percent(row["time_saved"]) for row in rows],
            "perplexity": [f"{row['ppl_increase']:+.2f}" for row in rows],
            "by KL": [f"{row['lost_by_kl']:+.2f}" for row in rows],
        }
    )
    return {"front": markdown(frame)}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("front", Arguments, measure, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
