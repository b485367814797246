"""Pictures of the pages in docs/mechanisms, from the result files.

`python -m benchmarks.pages` draws them. Savings that are counted from masks are called simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.mechanisms import SHOWN
from benchmarks.pictures import COLORS, INK, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Rows by key, as `benchmarks.mechanisms.changes` gives them.
Changes = Mapping[str, Mapping[str, Any]]
INCREASE = "perplexity increase"
SIMULATED = "of a prompt saved (simulated), %"
PROTOCOLS = {
    "teacher-forced": "generated tokens (teacher-forced)",
    "continuation": "prompt tokens (continuation)",
}
COLOR = {"teacher-forced": COLORS[1], "continuation": COLORS[0]}
POLICIES = ("skip", "attended", "extrapolate", "propagate")
HALTING = {
    "drift and entropy\nare low": "ablation, percentiles | H",
    "half, lowest\ndrift first": "scores | 50% at layer 20, lowest drift first",
    "half, highest\nkey norm first": "scores | 50% at layer 20, highest key norm first",
    "half, least\nattended first": "scores | 50% at layer 20, lowest attention first",
    "half, random": "scores | 50% at layer 20, lowest random first",
}
BITS = {
    "8": "bits | 8 bits",
    "4": "bits | 4 bits",
    "4, not rotated": "bits | 4 bits, no rotation",
    "4, symmetric,\ngroups of 32": "bits | 4 bits, symmetric, group 32",
    "2": "bits | 2 bits",
    "adaptive: 8, 4": "bits | adaptive, no 2 bits",
    "adaptive: 8, 4, 2": "bits | adaptive, nats (1.0, 2.3)",
}
FUSION = {label: key for label, key in SHOWN["fusion"].items() if key.startswith("ablation")}


def draw(
    changes: Changes,
    calibration: Mapping[str, Any],
    front: Mapping[str, Any],
    folder: Path,
) -> None:
    """Draw all of them; `calibration` and `front` are the results of those names."""
    with picture(folder / "halting.svg", height=3.4) as axes:
        _intervals(axes, changes, HALTING, 1200)
    with picture(folder / "kv-skipping.svg", height=3.8) as axes:
        _draw_policies(axes, changes)
    with picture(folder / "fusion.svg") as axes:
        _draw_fusion(axes, changes)
    with picture(folder / "quantization.svg", height=3.8) as axes:
        _intervals(axes, changes, BITS, 50)
        axes.set_ylabel("bits of a token")
    with picture(folder / "light-layers.svg") as axes:
        _draw_light_layers(axes, calibration["presets"]["balanced"], front)


def _scale(axes: Axes, which: str, ticks: Sequence[float], ends: tuple[float, float]) -> None:
    """A logarithmic axis of increases that is linear below 0.1, where they are noise."""
    getattr(axes, f"set_{which}scale")("symlog", linthresh=0.1, linscale=0.4)
    getattr(axes, f"set_{which}ticks")(ticks, [f"{tick:,}" for tick in ticks])
    getattr(axes, f"set_{which}lim")(ends)


def _intervals(axes: Axes, changes: Changes, shown: Mapping[str, str], highest: float) -> None:
    """A line for each row that is shown: its increase under each protocol, with the interval."""
    for line, key in enumerate(shown.values()):
        rows = {name: changes.get(f"{key} | {name}") for name in PROTOCOLS}
        rows = {name: row for name, row in rows.items() if row is not None}
        for place, (name, row) in enumerate(rows.items()):
            x, y = row["ppl_increase"], line + 0.24 * (place - (len(rows) - 1) / 2)
            _dot(axes, x, y, xerr=_errors(x, row["interval"]), color=COLOR[name])
    for name, label in PROTOCOLS.items():
        axes.plot([], [], "o", color=COLOR[name], markersize=5, label=label)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    ticks = [tick for tick in (0, 0.1, 1, 10, 100, 1000) if tick < highest]
    _scale(axes, "x", ticks, (-0.1, highest))
    axes.set_xlabel(f"{INCREASE}, interval of 95 %")
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8)


def _dot(axes: Axes, x: float, y: float, **style: Any) -> None:
    axes.errorbar(x, y, fmt="o", markersize=5, capsize=2, elinewidth=1.2, **style)


def _errors(value: float, ends: Sequence[float]) -> list[list[float]]:
    """The lengths of an error bar below and above a value."""
    return [[value - ends[0]], [ends[1] - value]]


def _policy(changes: Changes, policy: str, share: str, saving: str) -> tuple[list, list]:
    """Savings in per cent and increases of a policy where a share of the prompt stops."""
    name = "policies | {} at layer {} | {} | continuation"
    rows = [changes[name.format(share, layer, policy)] for layer in (24, 20, 15)]
    return [100 * row["saved"][saving] for row in rows], [row["ppl_increase"] for row in rows]


def _draw_policies(axes: Axes, changes: Changes) -> None:
    """Increase against layer-tokens saved, for half of the prompt and for all of it."""
    for color, marker, policy in zip(COLORS, "vDs^", POLICIES, strict=False):
        for share, line in (("50%", "-"), ("100%", "--")):
            x, y = _policy(changes, policy, share, "layer_tokens_saved")
            label = policy if line == "-" else None
            axes.plot(x, y, line, marker=marker, color=color, markersize=5, label=label)
    axes.plot([], [], "-", color=INK, label="half of the prompt stops")
    axes.plot([], [], "--", color=INK, label="all of it stops")
    axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    _scale(axes, "y", (0, 0.1, 1, 10), (-0.05, 30))
    axes.set(xlabel=f"layer-tokens {SIMULATED}", ylabel=INCREASE)
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8)


def _draw_fusion(axes: Axes, changes: Changes) -> None:
    """Fusion, alone and added, beside stopping half of the prompt."""
    for number, policy in enumerate(("skip", "extrapolate")):
        x, y = _policy(changes, policy, "50%", "exact_flops_saved")
        style = {"color": COLORS[2 * number], "markersize": 5}
        axes.plot(x, y, "-o", label=f"half of the prompt stops, {policy}", **style)
    for label, key in FUSION.items():
        row = changes[f"{key} | continuation"]
        x, y = 100 * row["saved"]["exact_flops_saved"], row["ppl_increase"]
        _dot(axes, x, y, yerr=_errors(y, row["interval"]), color=COLORS[1])
        axes.annotate(label, (x, y), xytext=(6, -11), textcoords="offset points")
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    _scale(axes, "y", (0, 0.1, 1, 5), (-0.05, 6))
    axes.set(xlabel=f"exact FLOPs {SIMULATED}", ylabel=f"{INCREASE}, interval of 95 %")
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8)


def _draw_light_layers(axes: Axes, found: Mapping[str, Any], front: Mapping[str, Any]) -> None:
    """Candidates of the calibration, the one chosen, and stopping without light layers."""
    lines = {
        "candidates with light layers": [
            (point["saved"]["prompt_exact_flops_saved"], point["cost"]) for point in found["points"]
        ]
    }
    families = {"maps": "whole layers, keys from maps", "skip": "whole layers, keys skipped"}
    for family, label in families.items():
        rows = [row for row in front["rows"].values() if row["family"] == family]
        lines[label] = [(row["saved"], row["lost_by_kl"]) for row in rows]
    for color, marker, (label, points) in zip(COLORS, "osv", lines.items(), strict=False):
        x, y = zip(*sorted(points), strict=True)
        axes.plot([100 * value for value in x], y, marker, color=color, markersize=5, label=label)
    levels = found["preset"]["provenance"]["verified"]["levels"]
    best = next(point for point in found["points"] if point["levels"] == levels)
    x, y = 100 * best["saved"]["prompt_exact_flops_saved"], best["cost"]
    axes.plot(x, y, "o", color=COLORS[0], markersize=11)
    place = {"xytext": (0, -10), "textcoords": "offset points", "ha": "center", "va": "top"}
    axes.annotate("balanced", (x, y), **place)
    axes.set_yscale("log")
    axes.set_yticks([0.1, 0.2, 1, 5], ["0.1", "0.2", "1", "5"])
    axes.minorticks_off()
    axes.set(xlabel="exact FLOPs of the prompt saved, %", ylabel=f"{INCREASE}, by KL divergence")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8)
