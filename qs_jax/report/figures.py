"""The figures of a report for papers: PNG and SVG by matplotlib (extra `plots`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qs_jax.errors import InputError
from qs_jax.files import write_whole
from qs_jax.report import measures
from qs_jax.report.content import PresetRuns, Report, TextRuns, thresholds
from qs_jax.report.measures import decayed, fit_decay
from qs_jax.report.trace import signal_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind too.
BLUE, GREEN, ORANGE, RED = "#0072B2", "#009E73", "#E69F00", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#E3E6EA"
# Beyond this many tokens their names do not fit under a picture.
_NAMED = 60


def require_matplotlib() -> None:
    """Say what to install where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--figures needs matplotlib: pip install 'qs-jax[plots]'.") from error


def names(presets: Sequence[str], results: int = 0, front: bool = False) -> list[str]:
    """Files of a report's figures: its presets' by name, of so many results, of a search."""
    kinds = [draw.__name__ for draw in (*_OF_TEXTS, *_OF_PRESETS, active_tokens)]
    stems = [f"{preset}.{kind}" for preset in presets for kind in kinds]
    stems += [f"results-{number}.active_tokens" for number in range(1, results + 1)]
    stems += ["pareto_front"] if front else []
    return [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]


def save(report: Report, folder: Path) -> list[Path]:
    """Draw every figure of a report, of a text those of each whole preset, as PNG and SVG.

    Returns:
      The files, which appear together or not at all.

    Raises:
      InputError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import rc_context

    presets = [] if report.text is None else [preset.name for preset in report.text.presets]
    kinds = (presets, len(report.results), report.front is not None)
    paths = [folder / name for name in names(*kinds)]
    # Text stays text in SVG; what a file holds does not depend on the day.
    plain: Any = {"svg.fonttype": "none", "svg.hashsalt": "qs-jax"}
    with rc_context(plain), write_whole(*paths) as staged:
        for figure, png, svg in zip(_draw(report), staged[::2], staged[1::2], strict=True):
            figure.savefig(png, dpi=200)
            figure.savefig(svg, dpi=200, metadata={"Date": None})
    return paths


def _draw(report: Report) -> Iterator[Figure]:
    """The figures, in the order of their names."""
    if (text := report.text) is not None:
        for preset in text.presets:
            yield from (draw(text, preset) for draw in _OF_TEXTS)
            yield from (draw(preset) for draw in _OF_PRESETS)
            counts, of = measures.active_tokens(preset.runs[-1].record), preset.name
            yield active_tokens(counts, of, f"{of} (simulated)")
    for row in report.results:
        of = f"{row['preset']}, {row['data']} ({'simulated' if row['simulated'] else 'counted'})"
        yield active_tokens(row["per_layer"]["layer_tokens"], row["preset"], of)
    if report.front is not None:
        yield pareto_front(report.front)


def _plot(title: str = "", width: float = 7.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure of one plot, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_plain(title))
    return figure, axes


def _plain(text: str) -> str:
    """Text as it stands: dollar signs start no formula, and a name need not be UTF-8."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def _map(text: TextRuns, preset: PresetRuns, title: str) -> tuple[Figure, Axes, dict[str, Any]]:
    """A figure of tokens by layers, and options of `imshow` that fit its axes."""
    width, layers = len(text.ids), preset.cfg.model.num_layers
    title = f"{title}, {preset.name} (simulated)"
    figure, axes = _plot(title, min(max(4.5, 0.16 * width), 14.0), 4.2)
    axes.set_ylabel("layer")
    if width <= _NAMED:
        shown = [_plain(label.strip()[:12]) or "␣" for label in text.labels]
        axes.set_xticks(range(width), shown, rotation=70, fontsize=7)
    else:
        axes.set_xlabel("token")
    extent = (-0.5, width - 0.5, 0.5, layers + 0.5)
    return figure, axes, {"origin": "lower", "aspect": "auto", "extent": extent}


def _categories(
    text: TextRuns, preset: PresetRuns, title: str, index_LT: np.ndarray, colors: dict[str, str]
) -> Figure:
    """A map whose cells are indices into `colors`, which also names them."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes, options = _map(text, preset, title)
    options |= {"cmap": ListedColormap(list(colors.values())), "interpolation": "nearest"}
    axes.imshow(index_LT, vmin=0, vmax=len(colors) - 1, **options)
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def halting_timeline(text: TextRuns, preset: PresetRuns) -> Figure:
    """Score as colour where a token computes, cut-offs as bars (paper Q.1, figure 20)."""
    figure, axes, options = _map(text, preset, "Halting timeline")
    name, values = _score(preset)
    axes.set_facecolor(GREY)
    ran = preset.runs[-1].record.active[:, 0]
    known = values[np.isfinite(values)]
    high = float(np.percentile(known, 95)) if known.size else 1.0
    image = axes.imshow(np.where(ran, values, np.nan), cmap="viridis", vmax=high, **options)
    figure.colorbar(image, ax=axes, label=name, extend="max")
    last = ran.shape[0] - np.argmax(ran[::-1], axis=0)
    stopped = np.flatnonzero(last < ran.shape[0])
    axes.hlines(last[stopped] + 0.5, stopped - 0.5, stopped + 0.5, color="black", linewidth=1.5)
    return figure


def _score(preset: PresetRuns) -> tuple[str, np.ndarray]:
    """What the preset's rule reads, `[L, T]`, and its name; the drift where no token comes near."""
    signals, tau = preset.runs[-1].signals, thresholds(preset)["drift"]
    if tau is not None:
        score = np.maximum(np.array(tau, float)[:, None] - signals["drift"], 0)
        if np.nanmax(score, initial=0) > 0:
            return "halting score max(τ - drift, 0)", score
    name = "received" if "received" in signals else "drift"
    return signal_names(preset.quicksilver)[name], signals[name]


def kv_writes(text: TextRuns, preset: PresetRuns) -> Figure:
    """Which keys and values are written (paper figure 10)."""
    record = preset.runs[-1].record
    conditions = [~record.kv_written, ~record.kv_held, record.active]
    colors = {
        "written": BLUE,
        "written for a token\nthat does not run": GREEN,
        "written, not needed\nafter the last token": ORANGE,
        "not written": GREY,
    }
    index = np.select(conditions, [3, 2, 0], 1)[:, 0]
    return _categories(text, preset, "KV writes", index, colors)


def bit_widths(text: TextRuns, preset: PresetRuns) -> Figure:
    """Bits of each token at each layer (paper figures 13, 19 right)."""
    bits = preset.runs[-1].record.bits[:, 0]
    colors = {"not quantised": BLUE, "8 bits": GREEN, "4 bits": ORANGE, "2 bits": RED}
    index = np.select([bits == count for count in (16, 8, 4, 2)], range(4))
    return _categories(text, preset, "Bit widths", index, colors)


def fusion_flow(text: TextRuns, preset: PresetRuns) -> Figure:
    """Tokens on their way up, and where two become one (paper Q, figures 11 and 12)."""
    figure, axes, _ = _map(text, preset, "Fusion flow")
    record = preset.runs[-1].record
    fused, depth = record.fused[:, 0], record.depth[0]
    layers, width = fused.shape
    tokens = np.arange(width)
    absorbed = (fused == tokens).sum(0)  # layers run before the token was absorbed
    merged = np.full(width, layers)
    layer, token = np.nonzero(fused != tokens)
    np.minimum.at(merged, fused[layer, token], layer)
    stops = np.minimum(depth, absorbed)
    alone = np.minimum(stops, merged)
    thin = min(2.0, 120 / width)
    axes.vlines(tokens, 0, alone, color=SKY, linewidth=thin, label="token on its own")
    axes.vlines(tokens, alone, stops, color=PURPLE, linewidth=thin, label="representative")
    arrow = {"arrowstyle": "->", "color": RED, "connectionstyle": "arc3,rad=-0.4"}
    for token in np.flatnonzero(absorbed < layers):
        layer = absorbed[token]
        axes.annotate("", (fused[layer, token], layer), (token, layer), arrowprops=arrow)
    halted = tokens[(depth < layers) & (stops == depth)]
    axes.plot(halted, stops[halted], "_", color="black", label="halted")
    axes.plot([], [], color=RED, label="fusion")
    axes.set_ylim(0, layers + 0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def entropy_by_layer(preset: PresetRuns) -> Figure:
    """Histograms of the entropy at a third, half and two thirds of the depth (paper figure 19)."""
    figure, axes = _plot(f"Entropy by layer, {preset.name}")
    signals = preset.runs[-1].signals
    name = "bits_entropy" if "bits_entropy" in signals else "entropy"
    layers = len(signals[name])
    chosen = sorted({max(1, round(layers * share)) for share in (1 / 3, 1 / 2, 2 / 3)})
    values = [row[np.isfinite(row)] for row in (signals[name][layer - 1] for layer in chosen)]
    bins = np.histogram_bin_edges(np.concatenate(values), 40)
    for layer, row, color in zip(chosen, values, (BLUE, RED, GREEN), strict=False):
        axes.hist(row, bins.tolist(), histtype="step", color=color, label=f"layer {layer}")
    for limit in thresholds(preset)["bits"] or ():
        if bins[0] <= limit <= bins[-1]:
            axes.axvline(limit, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel(f"{signal_names(preset.quicksilver)[name]}, nats")
    axes.set_ylabel("tokens")
    axes.legend()
    return figure


def drift_curves(preset: PresetRuns) -> Figure:
    """Drift of each token by layer: those that halt, and those that do not (paper figure 9)."""
    figure, axes = _plot(f"Drift by layer, {preset.name}")
    run = preset.runs[-1]
    drift = run.signals["drift"]
    layers = np.arange(1, len(drift) + 1)
    halted = run.record.depth[0] < len(drift)
    for where, color, name in ((~halted, BLUE, "runs all layers"), (halted, RED, "halts")):
        if where.any():
            faint = {"linewidth": 0.4, "alpha": min(1, 20 / where.sum())}
            axes.plot(layers, drift[:, where], color=color, **faint)
            axes.plot([], [], color=color, label=name)
    if (tau := thresholds(preset)["drift"]) is not None:
        axes.plot(layers, np.array(tau, float), color="black", linestyle="--", label="τ drift")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel(signal_names(preset.quicksilver)["drift"])
    axes.legend(fontsize=8)
    return figure


def active_tokens(active_L: Any, name: str, of: str) -> Figure:
    """Active tokens by layer with the fitted exponential, parameters in the legend (paper J, K)."""
    figure, axes = _plot(f"Active tokens, {of}")
    decay, layers = fit_decay(active_L), np.arange(1, len(active_L) + 1)
    r_squared = decay.pop("r_squared")
    fit = f"{decay['start']:.1f} exp(-{decay['rate']:.4f} l)"
    fit += "" if r_squared is None else f", R² = {r_squared:.3f}"
    axes.plot(layers, active_L, color=BLUE, marker="o", markersize=3, label=_plain(name))
    axes.plot(layers, decayed(layers, **decay), color=BLUE, linestyle=":", label=fit)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer l")
    axes.set_ylabel("active tokens")
    axes.legend(fontsize=8)
    return figure


def pareto_front(front: dict[str, Any]) -> Figure:
    """Candidates of a search, the front, and what was verified."""
    figure, axes = _plot()

    def columns(points: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
        return [100 * p["saving"] for p in points], [p["ppl_increase"] for p in points]

    for family in dict.fromkeys(point["family"] for point in front["points"]):
        points = [point for point in front["points"] if point["family"] == family]
        axes.scatter(*columns(points), alpha=0.45, label=family)
    along = sorted(front["front"], key=lambda point: point["saving"])
    axes.plot(*columns(along), color="#555555", label="Pareto front")
    if front["verified"]:
        label = "verification windows"
        axes.scatter(*columns(front["verified"]), color="black", marker="*", s=90, label=label)
    axes.axhline(front["budget"], color=PURPLE, linestyle="--", label="budget")
    axes.set_xlabel(f"{front['objective'].replace('_', ' ')} saved, % (simulated)")
    axes.set_ylabel("perplexity increase")
    axes.legend(fontsize=8)
    return figure


_OF_TEXTS = (halting_timeline, kv_writes, fusion_flow, bit_widths)
_OF_PRESETS = (entropy_by_layer, drift_curves)
