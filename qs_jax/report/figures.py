"""The figures of a report for papers: PNG and SVG by matplotlib (extra `plots`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qs_jax.errors import InputError
from qs_jax.report import measures
from qs_jax.report.content import BITS, PresetRuns, Report, TextRuns, fused_changes, thresholds
from qs_jax.report.measures import COMPONENTS, costs, fit_decay
from qs_jax.report.trace import Run, signal_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind too.
BLUE, GREEN, ORANGE, RED = "#0072B2", "#009E73", "#E69F00", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#E3E6EA"
CYCLE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
_POLICIES = {"skip": (BLUE, "o"), "extrapolate": (RED, "s"), "propagate": (GREEN, "^")}
_BIT_NAMES = ("not quantised", "8 bits", "4 bits", "2 bits")  # in the order of BITS
# Beyond this many tokens their names do not fit under a picture.
_NAMED = 60
_FORMATS = ("png", "svg")


def require_matplotlib() -> None:
    """Say what to install where matplotlib is missing.

    Raises:
      InputError: It is.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--figures needs matplotlib: pip install 'qs-jax[plots]'.") from error


def save(report: Report, folder: Path) -> list[Path]:
    """Draw every figure of a report into a folder, as PNG and SVG.

    Figures of a text show the whole preset, one set for each preset.

    Returns:
      The files.

    Raises:
      InputError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    drawn = list(_of_text(report.text)) if report.text is not None else []
    for number, row in enumerate(report.results, start=1):
        names = (f"results-{number}.active_tokens", f"results-{number}.cost")
        drawn += zip(names, _of_results(row), strict=True)
    if report.front is not None:
        drawn.append(("pareto_front", pareto_front(report.front)))
    written = []
    # Text stays text in SVG; what a file holds does not depend on the day.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "qs-jax"}):
        for name, figure in drawn:
            for kind in _FORMATS:
                path = folder / f"{name}.{kind}"
                figure.savefig(path, dpi=200, metadata={"Date": None} if kind == "svg" else None)
                written.append(path)
    return written


def new_figure(width: float = 7.0, height: float = 3.6) -> tuple[Figure, Axes]:
    """A figure of one plot, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _of_text(text: TextRuns) -> Iterator[tuple[str, Figure]]:
    maps = (halting_timeline, kv_writes, fusion_flow, bit_widths)
    curves = (entropy_by_layer, drift_curves, active_tokens, cost)
    for preset in text.presets:
        for draw in (*maps, *curves):
            yield f"{preset.name}.{draw.__name__}", draw(text, preset, preset.runs[-1])


def _map(text: TextRuns, title: str) -> tuple[Figure, Axes, dict[str, Any]]:
    width, layers = len(text.ids), text.presets[0].cfg.model.num_layers
    figure, axes = new_figure(min(max(4.5, 0.16 * width), 14.0), 4.2)
    axes.set_title(title)
    axes.set_ylabel("layer")
    if width <= _NAMED:
        # Dollar signs would start a formula.
        names = [label.strip()[:12].replace("$", r"\$") or "␣" for label in text.labels]
        axes.set_xticks(range(width), names, rotation=70, fontsize=7)
    else:
        axes.set_xlabel("token")
    extent = (-0.5, width - 0.5, 0.5, layers + 0.5)
    return figure, axes, {"origin": "lower", "aspect": "auto", "extent": extent}


def _title(what: str, preset: PresetRuns) -> str:
    return f"{what}, {preset.name} (simulated)"


def _categories(text: TextRuns, title: str, place_LT: np.ndarray, colors: dict[str, str]) -> Figure:
    """A map whose cells are places in `colors`, which also names them."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes, options = _map(text, title)
    options |= {"cmap": ListedColormap(list(colors.values())), "interpolation": "nearest"}
    axes.imshow(place_LT, vmin=0, vmax=len(colors) - 1, **options)
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def halting_timeline(text: TextRuns, preset: PresetRuns, run: Run) -> Figure:
    """Score as colour where a token computes, cut-offs as bars (paper Q.1, figure 20)."""
    figure, axes, options = _map(text, _title("Halting timeline", preset))
    name, values = score_of(preset, run)
    axes.set_facecolor(GREY)
    ran = run.record.active[:, 0]
    known = values[np.isfinite(values)]
    high = float(np.percentile(known, 95)) if known.size else 1.0
    shown = axes.imshow(np.where(ran, values, np.nan), cmap="viridis", vmax=high, **options)
    figure.colorbar(shown, ax=axes, label=name, extend="max")
    last = ran.shape[0] - np.argmax(ran[::-1], axis=0)
    for token in np.flatnonzero(last < ran.shape[0]):
        axes.hlines(last[token] + 0.5, token - 0.5, token + 0.5, color="black", linewidth=1.5)
    return figure


def score_of(preset: PresetRuns, run: Run) -> tuple[str, np.ndarray]:
    """What the preset's rule reads, `[L, T]`, and its name.

    The paper's score max(tau - drift, 0) where some token reaches it; else the quota's attention;
    else the drift.
    """
    tau = thresholds(preset.quicksilver, preset.cfg.model)["drift"]
    if tau is not None:
        at = np.array([np.nan if value is None else value for value in tau])[:, None]
        score = np.maximum(at - run.signals["drift"], 0)
        if np.nanmax(score, initial=0) > 0:
            return "halting score max(τ - drift, 0)", score
    name = "received" if "received" in run.signals else "drift"
    return signal_names(preset.quicksilver)[name], run.signals[name]


def kv_writes(text: TextRuns, preset: PresetRuns, run: Run) -> Figure:
    """Which keys and values are written (paper figure 10)."""
    record = run.record
    written, held, ran = (
        array[:, 0] for array in (record.kv_written, record.kv_held, record.active)
    )
    code = np.select([~written, ~held, ran], [3, 2, 0], 1)
    colors = {
        "written": BLUE,
        "written for a token\nthat does not run": GREEN,
        "written, not needed\nafter the last token": ORANGE,
        "not written": GREY,
    }
    return _categories(text, _title("KV writes", preset), code, colors)


def bit_widths(text: TextRuns, preset: PresetRuns, run: Run) -> Figure:
    """Bits of each token at each layer (paper figures 13, 19 right)."""
    place = np.select([run.record.bits[:, 0] == bits for bits in BITS], range(len(BITS)))
    colors: dict[str, str] = dict(zip(_BIT_NAMES, (BLUE, GREEN, ORANGE, RED), strict=True))
    return _categories(text, _title("Bit widths", preset), place, colors)


def fusion_flow(text: TextRuns, preset: PresetRuns, run: Run) -> Figure:
    """Tokens on their way up, and where two become one (paper Q, figures 11 and 12)."""
    figure, axes, _ = _map(text, _title("Fusion flow", preset))
    layers, width = run.record.active[:, 0].shape
    absorbed, merged = np.full(width, layers), np.full(width, layers)
    arcs = []
    for layer, token, into in fused_changes(run.record.fused[:, 0]).tolist():
        if absorbed[token] == layers:
            absorbed[token] = layer - 1
            arcs.append((layer - 1, token, into))
        merged[into] = min(merged[into], layer - 1)
    stops = np.minimum(run.record.depth[0], absorbed)
    tokens = np.arange(width)
    thin = min(2.0, 120 / width)
    alone = np.minimum(stops, merged)
    axes.vlines(tokens, 0, alone, color=SKY, linewidth=thin, label="token on its own")
    axes.vlines(tokens, alone, stops, color=PURPLE, linewidth=thin, label="representative")
    for layer, token, into in arcs:
        axes.annotate(
            "",
            (into, layer),
            (token, layer),
            arrowprops={"arrowstyle": "->", "color": RED, "connectionstyle": "arc3,rad=-0.4"},
        )
    halted = tokens[(run.record.depth[0] < layers) & (stops == run.record.depth[0])]
    axes.plot(halted, stops[halted], "_", color="black", label="halted")
    axes.plot([], [], color=RED, label="fusion")
    axes.set_ylim(0, layers + 0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def entropy_by_layer(text: TextRuns, preset: PresetRuns, run: Run) -> Figure:
    """Histograms of the entropy at a third, half and two thirds of the depth (paper figure 19)."""
    figure, axes = new_figure()
    qs = preset.quicksilver
    name = "bits_entropy" if "bits_entropy" in run.signals else "entropy"
    layers = len(run.signals[name])
    shown = sorted({max(1, round(layers * share)) for share in (1 / 3, 1 / 2, 2 / 3)})
    values = [run.signals[name][layer - 1] for layer in shown]
    values = [each[np.isfinite(each)] for each in values]
    bins = np.histogram_bin_edges(np.concatenate(values), 40)
    for layer, each, color in zip(shown, values, CYCLE, strict=False):
        axes.hist(each, bins.tolist(), histtype="step", color=color, label=f"layer {layer}")
    limits = thresholds(qs, preset.cfg.model)["bits"]
    inside = [value for value in limits or () if bins[0] <= value <= bins[-1]]
    for value in inside:
        axes.axvline(value, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel(f"{signal_names(qs)[name]}, nats")
    axes.set_ylabel("tokens")
    axes.set_title(f"Entropy by layer, {preset.name}")
    axes.legend()
    return figure


def drift_curves(text: TextRuns, preset: PresetRuns, run: Run) -> Figure:
    """Drift of each token by layer: those that halt, and those that do not (paper figure 9)."""
    figure, axes = new_figure()
    drift = run.signals["drift"]
    layers = np.arange(1, len(drift) + 1)
    halted = run.record.depth[0] < len(drift)
    for where, color, name in ((~halted, BLUE, "runs all layers"), (halted, RED, "halts")):
        if where.any():
            curves = drift[:, where]
            axes.plot(layers, curves, color=color, linewidth=0.4, alpha=min(1, 20 / where.sum()))
            axes.plot([], [], color=color, label=name)
    tau = thresholds(preset.quicksilver, preset.cfg.model)["drift"]
    if tau is not None:
        at = [np.nan if value is None else value for value in tau]
        axes.plot(layers, at, color="black", linestyle="--", label="τ drift")
    axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel(signal_names(preset.quicksilver)["drift"])
    axes.set_title(f"Drift by layer, {preset.name}")
    axes.legend(fontsize=8)
    return figure


def active_tokens(text: TextRuns, preset: PresetRuns, run: Run) -> Figure:
    """Active tokens by layer with the fitted exponential (paper J, K)."""
    figure, axes = new_figure()
    draw_decay(axes, measures.active_tokens(run.record), BLUE, preset.name)
    axes.set_title(_title("Active tokens", preset))
    return figure


def draw_decay(axes: Axes, active_L: np.ndarray, color: str, name: str) -> None:
    """Counts of active tokens and their fit, parameters in the legend."""
    decay, layers = fit_decay(active_L), np.arange(1, len(active_L) + 1)
    axes.plot(layers, active_L, color=color, marker="o", markersize=3, label=name)
    told = "" if decay.r_squared is None else f", R² = {decay.r_squared:.3f}"
    axes.plot(
        layers,
        decay.start * np.exp(-decay.rate * layers),
        color=color,
        linestyle=":",
        label=f"{decay.start:.1f} exp(-{decay.rate:.4f} l){told}",
    )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer l")
    axes.set_ylabel("active tokens")
    axes.legend(fontsize=8)


def cost(text: TextRuns, preset: PresetRuns, run: Run) -> Figure:
    """FLOPs by component, of the dense model and of the preset (compare paper Table 7)."""
    figure, axes = new_figure(8.0)
    model, sizes = preset.cfg.model, preset.map_sizes
    found = [costs(each.record, model, each.quicksilver, sizes) for each in (preset.runs[0], run)]
    draw_costs(axes, found, ["dense", preset.name], sum(found[0].values()))
    axes.set_title(_title("Cost by component", preset))
    return figure


def draw_costs(axes: Axes, found: list[dict[str, float]], names: list[str], whole: float) -> None:
    """Bars of each component, as percentages of `whole`."""
    parts = [name for name in COMPONENTS if any(name in each for each in found)]
    width = 0.8 / len(found)
    for index, (each, name) in enumerate(zip(found, names, strict=True)):
        place = np.arange(len(parts)) + (index - (len(found) - 1) / 2) * width
        heights = [100 * each.get(part, 0) / whole for part in parts]
        axes.bar(place, heights, width, color=CYCLE[index % len(CYCLE)], label=name)
    labels = [COMPONENTS[part].replace(" ", "\n") for part in parts]
    axes.set_xticks(range(len(parts)), labels, fontsize=8)
    axes.set_ylabel("% of dense FLOPs, exact count")
    axes.legend(fontsize=8)


def _of_results(row: dict[str, Any]) -> tuple[Figure, Figure]:
    """Active tokens and cost of an evaluation."""
    how = "simulated" if row["simulated"] else "counted"
    of = f"{row['preset']}, {row['data']} ({how})"
    decay, axes = new_figure()
    draw_decay(axes, np.array(row["per_layer"]["layer_tokens"]), BLUE, row["preset"])
    axes.set_title(f"Active tokens, {of}")
    costs, axes = new_figure(8.0)
    draw_costs(axes, [row["costs"]], [row["preset"]], row["dense_flops"])
    axes.set_title(f"Cost by component, {of}")
    return decay, costs


def pareto_front(front: dict[str, Any]) -> Figure:
    """Candidates of a search, the front, and what was verified."""
    figure, axes = new_figure()
    for family in dict.fromkeys(point["family"] for point in front["points"]):
        color, marker = _POLICIES.get(family, ("black", "x"))
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
