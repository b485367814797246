"""Presets of a search on disk: the preset, the maps it reads, the search and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qs_jax import presets
from qs_jax.config import ModelConfig
from qs_jax.evaluation.journal import write_json
from qs_jax.presets import maps_path

if TYPE_CHECKING:
    from qs_jax.calibration.search import Calibration


def save(calibration: Calibration, path: str | Path, model: ModelConfig) -> list[Path]:
    """Write a preset as FILE.json and what belongs to it beside it.

    FILE.search.json holds everything that was measured, FILE.kv_maps.safetensors the maps the
    preset reads (if it reads any), FILE.front.png the Pareto front (if matplotlib is installed).

    Returns:
      The files, the preset first.
    """
    path = Path(path)
    written = [presets.save(path, calibration.preset, model)]
    if calibration.maps is not None:
        written.append(calibration.maps.save(maps_path(path)))
    found = path.with_name(f"{path.stem}.search.json")
    write_json(found, calibration.to_dict())
    written.append(found)
    picture = plot_front(calibration, path.with_name(f"{path.stem}.front.png"))
    return written if picture is None else [*written, picture]


def plot_front(calibration: Calibration, path: Path) -> Path | None:
    """Draw all candidates, the front and what was verified; None where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    # Okabe and Ito's colours, told apart by the colour-blind too; and shapes besides.
    styles = {
        "skip": ("#0072B2", "o"),
        "extrapolate": ("#D55E00", "s"),
        "propagate": ("#009E73", "^"),
    }
    for family in dict.fromkeys(point.family for point in calibration.points):
        color, marker = styles.get(family, ("#000000", "x"))
        own = [point for point in calibration.points if point.family == family]
        axes.scatter(
            [100 * point.saving for point in own],
            [point.ppl_increase for point in own],
            color=color,
            marker=marker,
            alpha=0.45,
            label=f"{family}, calibration windows",
        )
    axes.plot(
        [100 * point.saving for point in calibration.front],
        [point.ppl_increase for point in calibration.front],
        color="#555555",
        label="Pareto front",
    )
    provenance = calibration.preset.provenance
    objective = f"{provenance['objective']}_saved"
    told = [entry for entry in calibration.verified if entry.get(objective) is not None]
    if told:
        axes.scatter(
            [100 * entry[objective] for entry in told],
            [entry["ppl_increase"] for entry in told],
            color="#000000",
            marker="*",
            s=90,
            label="verification windows",
        )
    axes.axhline(provenance["max_ppl_increase"], color="#CC79A7", linestyle="--", label="budget")
    axes.set_xlabel(f"{provenance['objective'].replace('_', ' ')} saved, %")
    axes.set_ylabel("perplexity increase")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    return path
