"""Figures of what other commands measured: evaluations, a search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qs_jax.report.content import Report
from qs_jax.report.figures import (
    BLUE,
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
