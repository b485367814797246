"""Figures of what other commands measured: evaluations, a search, an ablation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qs_jax.report.content import Report
from qs_jax.report.figures import (
    BLUE,
    CYCLE,
    GREEN,
    PURPLE,
    RED,
    draw_costs,
    draw_decay,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = {"skip": (BLUE, "o"), "extrapolate": (RED, "s"), "propagate": (GREEN, "^")}


def draw(report: Report) -> list[tuple[str, Figure]]:
    """Names and figures."""
    found = []
    for index, row in enumerate(report.results):
        name = f"results-{index + 1}"
        found += [(f"{name}.active_tokens", _decay(row)), (f"{name}.cost", _cost(row))]
    if report.front is not None:
        found.append(("pareto_front", pareto_front(report.front)))
    if report.ablation is not None:
        found += list(_ablations(report.ablation))
    return found


def _decay(row: dict[str, Any]) -> Figure:
    figure, axes = new_figure()
    draw_decay(axes, np.array(row["per_layer"]["layer_tokens"]), BLUE, row["preset"])
    axes.set_title(f"Active tokens, {row['preset']}, {row['data']} ({_how(row)})")
    return figure


def _cost(row: dict[str, Any]) -> Figure:
    figure, axes = new_figure(8.0)
    draw_costs(axes, [row["costs"]], [row["preset"]], row["dense_flops"])
    axes.set_title(f"Cost by component, {row['preset']}, {row['data']} ({_how(row)})")
    return figure


def _how(row: dict[str, Any]) -> str:
    return "simulated" if row["simulated"] else "counted"


def pareto_front(front: dict[str, Any]) -> Figure:
    """Candidates of a search, the front, and what was verified."""
    figure, axes = new_figure()
    for family in dict.fromkeys(point["family"] for point in front["points"]):
        color, marker = _STYLES.get(family, ("black", "x"))
        own = [point for point in front["points"] if point["family"] == family]
        saved, cost = _places(own)
        axes.scatter(saved, cost, color=color, marker=marker, alpha=0.45, label=family)
    along = sorted(front["front"], key=lambda point: point["saving"])
    axes.plot(*_places(along), color="#555555", label="Pareto front")
    if front["verified"]:
        saved, cost = _places(front["verified"])
        axes.scatter(saved, cost, color="black", marker="*", s=90, label="verification windows")
    axes.axhline(front["budget"], color=PURPLE, linestyle="--", label="budget")
    axes.set_xlabel(f"{front['objective'].replace('_', ' ')} saved, % (simulated)")
    axes.set_ylabel("perplexity increase")
    axes.legend(fontsize=8)
    return figure


def _places(points: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    saved = [100 * point["saving"] for point in points]
    return saved, [point["ppl_increase"] for point in points]


def _ablations(ablation: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for group in ablation["groups"]:
        name = re.sub(r"[^\w.-]+", "-", group["name"]).strip("-")
        for kind in ("isolated", "cumulative"):
            rows = [row for row in group["rows"] if row["kind"] == kind]
            if rows:
                yield f"ablation.{name}.{kind}", ablation_bars(rows, f"{group['name']}, {kind}")


def ablation_bars(rows: list[dict[str, Any]], title: str) -> Figure:
    """Shares saved, and the perplexity they cost (paper figures 6 and 7)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    fields = {"exact_flops_saved": "FLOPs, simulated", "kv_bytes_saved": "KV bytes, simulated"}
    fields["time_saved"] = "time, measured"
    shown = {
        field: name for field, name in fields.items() if any(row[field] is not None for row in rows)
    }
    places, width = np.arange(len(rows)), 0.8 / len(shown)
    for index, (field, name) in enumerate(shown.items()):
        heights = [np.nan if row[field] is None else 100 * row[field] for row in rows]
        at = places + (index - (len(shown) - 1) / 2) * width
        left.bar(at, heights, width, color=CYCLE[index], label=name)
    left.set_ylabel("saved, %")
    left.legend(fontsize=8)
    right.bar(places, [row["ppl_increase"] for row in rows], color=RED)
    right.set_ylabel("perplexity increase")
    for axes in (left, right):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(places, [row["name"] for row in rows], fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure
