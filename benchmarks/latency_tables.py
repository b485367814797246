"""Tables of benchmarks/README.md from the result file of `benchmarks.latency`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import latency_headline as figures
from benchmarks.components import COMPONENTS

NOT_YET = "Not measured yet: `python -m benchmarks.latency --ckpt DIR`."


def render(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and Markdown of each table; a results dict without groups gives a note instead."""
    groups = results.get("groups", {})
    measured = bool(groups)
    yield "latency headline", _headline(results) if measured else NOT_YET
    yield "latency details", _details(results) if measured else NOT_YET
    for section in ("prefill", "scoring", "decode"):
        found = [g for g in groups.values() if g.get("section") == section]
        found.sort(key=lambda group: (group["length"], group["batch"]))
        tables = [_group(group, results) for group in found]
        yield f"latency {section}", "\n\n".join(tables) if tables else NOT_YET
    components = results.get("components", {})
    yield "latency components", _components(components) if components else NOT_YET
    deciding = results.get("deciding", {})
    yield "latency deciding", _deciding(deciding) if deciding else NOT_YET
    yield "latency skipped", _skipped(results.get("skipped", {})) if measured else NOT_YET
    yield "latency about", _about(results) if measured else NOT_YET


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def _headline(results: dict[str, Any]) -> str:
    rows = []
    for name, figure in figures.worst(results).items():
        sign, target, text = figures.TARGETS[name]
        shown, interval = ("not measured", "") if figure is None else _shown(figure)
        verdict = "" if figure is None else _verdict(figure)
        rows.append([f"`{name}`: {text}", shown, interval, f"{sign} {target:g}", verdict])
    return _table(["figure", "measured", "95 %", "target", "met"], rows)


def _shown(figure: figures.Figure) -> tuple[str, str]:
    bounds = figure.interval
    interval = "" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"
    return f"{figure.value:.3f}", interval


def _verdict(figure: figures.Figure) -> str:
    """Whether the target is met; where its interval holds the target, that it cannot be told."""
    met = figures.met(figure.name, figure.value)
    target = figures.TARGETS[figure.name][1]
    bounds = figure.interval
    within = bounds is not None and bounds[0] <= target <= bounds[1]
    return ("yes" if met else "**no**") + (", within noise" if within else "")


def _details(results: dict[str, Any]) -> str:
    rows = []
    for figure in figures.figures(results):
        rows.append([f"`{figure.name}`", figure.where, *_shown(figure)])
    return _table(["figure", "where", "value", "95 %"], rows)


def _group(group: dict[str, Any], results: dict[str, Any]) -> str:
    section, rows = group["section"], group["rows"]
    unit = "ms/token" if section == "decode" else "ms"
    head = [f"{group['batch']} x {group['length']} tokens", unit, "time / dense (95 %)", "tokens/s"]
    head += ["exact FLOPs saved", "time saved / FLOPs saved", "of peak", "memory, MB", "compile, s"]
    lines = []
    for name, row in rows.items():
        if "runs" not in row:
            lines.append([name, "not measured", row["not_measured"], *[""] * (len(head) - 3)])
            continue
        base = rows.get(row["baseline"], {})
        lines.append([name, *_cells(group, row, base if "runs" in base else None, results)])
    runs = {len(row["runs"]["seconds"]) for row in rows.values() if "runs" in row}
    note = f"Medians of {_range(runs)} interleaved runs; commit {group.get('commit')}"
    if group.get("machine"):
        note += f"; {figures.processor_of(group)}, {_peaks(group['machine'])} in that run"
    note += "."
    return f"{_table(head, lines)}\n\n{note}"


def _cells(
    group: dict[str, Any], row: dict[str, Any], base: dict[str, Any] | None, results: dict[str, Any]
) -> list[str]:
    batch, length, section = group["batch"], group["length"], group["section"]
    seconds = row["seconds"]
    tokens = batch if section == "decode" else batch * length
    saved = row.get("exact_flops_saved")
    over = "" if base is None else _ratio(row, base)
    conversion = None
    if base is not None and saved is not None and section != "decode":
        conversion = figures.conversion(row, base)
    memory = (row.get("memory") or {}).get("peak_bytes")
    return [
        f"{seconds * 1e3:,.1f}",
        over,
        f"{tokens / seconds:,.0f}",
        "" if saved is None else f"{saved:.1%}".replace("-0.0%", "0.0%"),
        "" if conversion is None else f"{conversion:.2f}",
        _of_peak(group, row, results),
        "" if memory is None else f"{memory / 1e6:,.0f}",
        f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
    ]


def _ratio(row: dict[str, Any], base: dict[str, Any]) -> str:
    found = f"{figures.ratio(row, base):.3f}"
    interval = figures.interval(row, base) if row is not base else None
    return found if interval is None else f"{found} ({interval[0]:.2f}-{interval[1]:.2f})"


def _of_peak(group: dict[str, Any], row: dict[str, Any], results: dict[str, Any]) -> str:
    if not group.get("machine") or "exact_flops" not in row:
        return ""
    machine = figures.peaks(results)[figures.processor_of(group)]
    if group["section"] == "decode":
        limit = group["rows"].get(figures.READ_ROW, {}).get("seconds")
        if limit is None:
            return ""
        limit *= 1 if row.get("dtype") == "float32" else 0.5  # it is of float32
        return f"{limit / row['seconds']:.0%} of bandwidth"
    return f"{row['exact_flops'] / row['seconds'] / machine['gemm_flops']:.0%} of GEMM"


def _components(components: dict[str, dict[str, float]]) -> str:
    shown = [name for name in COMPONENTS if any(name in part for part in components.values())]
    rows = []
    for name in shown:
        cells = []
        for part in components.values():
            total, value = sum(part.values()), part.get(name, 0.0)
            cells.append(f"{value * 1e3:,.1f} ({value / total:.1%})")
        rows.append([COMPONENTS[name], *cells])
    return _table(["ms (share)", *components], rows)


def _deciding(deciding: dict[str, dict[str, float]]) -> str:
    dense = sum(deciding["dense"].values())
    presets = [name for name in deciding if name != "dense"]
    rows = []
    for scope in figures.DECIDING:
        spent = [deciding[name].get(scope, 0.0) for name in presets]
        cells = [f"{value * 1e3:,.1f} ({value / dense:.1%})" for value in spent]
        rows.append([COMPONENTS[scope], *cells])
    return _table(["ms (of dense)", *presets], rows)


def _skipped(skipped: dict[str, str]) -> str:
    if not skipped:
        return "Nothing was left out."
    note = "Tables above of a size that stands here hold what a quick run measures."
    table = _table(["left out", "why"], [[key, reason] for key, reason in skipped.items()])
    return f"{table}\n\n{note}"


def _range(counts: set[int]) -> str:
    if not counts:
        return "no"
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def _peaks(machine: dict[str, Any]) -> str:
    return (
        f"best matrix product {machine['gemm_flops'] / 1e9:,.0f} GFLOP/s, best read "
        f"{machine['bandwidth'] / 1e9:.1f} GB/s"
    )


def _about(results: dict[str, Any]) -> str:
    about, made_with = results["about"], results["environment"]
    machine = results["machine"]
    each = "; ".join(f"{name}: {_peaks(best)}" for name, best in figures.peaks(results).items())
    packages = made_with["packages"]
    versions = "".join(f", {name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['model']}, {about['dtype']}, {about['text']}; greedy, {about['new_tokens']} new "
        f"tokens. {machine['device']} ({machine['platform']}), {made_with['cores']} cores. Of all "
        f"runs, {each}. Python {made_with['python']}, jax {packages['jax']}{versions}. "
        f"Peak resident memory of the last run's process {about['peak_rss_bytes'] / 1e9:.1f} GB."
    )
