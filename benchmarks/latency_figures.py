"""The headline of `benchmarks.latency`, and the tables of benchmarks/README.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.latency_rows import FRACTIONS, READ_ROW
from benchmarks.tables import markdown, origin, percent
from benchmarks.timing import interval, ratio

# Name, target as a comparison, and what it is.
TARGETS: dict[str, tuple[str, float, str]] = {
    "conversion_efficiency": (">=", 0.95, "share of time saved / share of exact FLOPs saved"),
    "off_over_dense": ("<=", 1.01, "time of preset off / dense"),
    "no_saving_over_dense": ("<=", 1.03, "time / dense where nothing stops, the worst"),
    "prefill_hf_over_ours": (">=", 1.0, "time of HF torch, its fastest / ours, dense prefill"),
    "decode_ours_over_hf": (">=", 2.0, "tokens per second, ours / HF generate at its fastest"),
    "decode_bandwidth_fraction": (">=", 0.6, "float32 tokens per second / what bandwidth allows"),
    "half_depth_decode_speedup": (">=", 1.7, "tokens per second, all leave at half depth / dense"),
    "signal_share": ("<=", 0.02, "time in the scopes of decisions / dense, the worst preset"),
    "kv_bytes_over_skip_rate": (">=", 0.9, "share of KV bytes not allocated / of keys skipped"),
}
# Scopes of `benchmarks.trace` that decide: drifts and entropies, who halts, who fuses.
DECIDING = ("signals", "halt", "fuse")
# What people run: groups and rows of the page's tables.
SHOWN = {
    "prefill": ("prefill 4x512", "prefill 1x2048"),
    "decode": ("decode 1x128", "decode 1x2048"),
}
_ROWS = ("dense", "balanced", "small-cache", "active 0.5", "half depth")


class Figure(NamedTuple):
    """One measurement that a headline figure may be chosen from, by group and row.

    `interval` holds the value with 95 % confidence; None unless it comes from six ratios or more.
    """

    name: str
    where: str
    value: float
    interval: tuple[float, float] | None = None


def headline(results: dict[str, Any]) -> dict[str, Figure | None]:
    """The worst of each headline figure's measurements; None where nothing was measured."""
    figures = list(all_figures(results))
    worst: dict[str, Figure | None] = {}
    for name, (sign, _, _) in TARGETS.items():
        choose = min if sign == ">=" else max
        ours = [figure for figure in figures if figure.name == name]
        worst[name] = choose(ours, key=lambda figure: figure.value, default=None)
    return worst


def all_figures(results: dict[str, Any]) -> Iterator[Figure]:
    """Every figure that a headline figure is chosen from."""
    deciding = results.get("deciding", {})
    for preset in (name for name in deciding if name != "dense"):
        spent = sum(deciding[preset].get(scope, 0.0) for scope in DECIDING)
        share = spent / sum(deciding["dense"].values())
        yield Figure("signal_share", f"prefill, {preset}", share)
    groups = {key: timed_rows(group) for key, group in results.get("groups", {}).items()}
    for key in ("prefill 4x512", "prefill 8x512"):
        yield from _prefill(key, groups.get(key, {}))
    # The shortest context of one row.
    single = (key for key in groups if key.startswith("decode 1x") and "dense" in groups[key])
    shortest = min(single, key=lambda key: int(key.rpartition("x")[2]), default="")
    yield from _decode(shortest, groups.get(shortest, {}))
    for key, rows in groups.items():
        dense = rows.get("dense", {}).get("kv_bytes")
        for name, row in rows.items() if key.startswith("decode") else ():
            rate = row.get("kv_skip_rate") or 0.0
            if dense and rate > 0:
                value = (1 - row["kv_bytes"] / dense) / rate
                yield Figure("kv_bytes_over_skip_rate", f"{key}, {name}", value)


def timed_rows(group: dict[str, Any]) -> dict[str, Any]:
    """Rows of a group that have times."""
    return {name: row for name, row in group["rows"].items() if "runs" in row}


def _prefill(key: str, rows: dict[str, Any]) -> Iterator[Figure]:
    for name, row in rows.items():
        where, over, bounds = f"{key}, {name}", ratio(row), interval(row)
        saved = row.get("exact_flops_saved", 0.0)
        saves_nothing = row.get("layer_tokens_saved", 1.0) <= 0
        if name in [f"active {fraction:g}" for fraction in FRACTIONS] and saved > 0:
            ends = bounds and ((1 - bounds[1]) / saved, (1 - bounds[0]) / saved)
            yield Figure("conversion_efficiency", where, (1 - over) / saved, ends)
        elif name == "off":
            yield Figure("off_over_dense", key, over, bounds)
        elif name == fastest_hf(rows):
            yield Figure("prefill_hf_over_ours", where, over, bounds)
        # The masked engine never saves anything.
        elif not name.startswith("dense") and not name.endswith("masked") and saves_nothing:
            yield Figure("no_saving_over_dense", where, over, bounds)


def _decode(key: str, rows: dict[str, Any]) -> Iterator[Figure]:
    hf = fastest_hf(rows)
    if hf is not None:
        over, bounds = ratio(rows[hf], "call_seconds"), interval(rows[hf], "call_seconds")
        yield Figure("decode_ours_over_hf", f"{key}, {hf}", over, bounds)
    if "half depth" in rows:
        over, bounds = ratio(rows["half depth"]), interval(rows["half depth"])
        ends = bounds and (1 / bounds[1], 1 / bounds[0])
        yield Figure("half_depth_decode_speedup", key, 1 / over, ends)
    exact = rows.get("dense, float32", rows.get("dense", {}))
    if READ_ROW in rows and exact.get("dtype", "float32") == "float32":
        # Both are timed beside the dense row.
        yield Figure("decode_bandwidth_fraction", key, ratio(rows[READ_ROW]) / ratio(exact))


def fastest_hf(rows: dict[str, Any]) -> str | None:
    """Name of the fastest Hugging Face row."""
    names = [name for name, row in rows.items() if name.startswith("HF ") and "runs" in row]
    return min(names, key=lambda name: rows[name]["seconds"], default=None)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Markdown of each table of the page, by name."""
    sections = {f"latency {name}": _section(name, results["groups"]) for name in SHOWN}
    return {"latency headline": _headline(results), "latency origin": origin(results)} | sections


def _headline(results: dict[str, Any]) -> str:
    lines = []
    for name, figure in headline(results).items():
        sign, target, text = TARGETS[name]
        line = {"figure": f"`{name}`: {text}", "target": f"{sign} {target:g}"}
        if figure is not None:
            good = figure.value >= target if sign == ">=" else figure.value <= target
            line |= {"value": f"{figure.value:.3f}", "95 %": _range(figure.interval)}
            line["met"] = "yes" if good else "**no**"
        lines.append(line)
    return markdown(pd.DataFrame(lines).fillna(""))


def _range(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f"{bounds[0]:.2f} to {bounds[1]:.2f}"


def _section(section: str, groups: dict[str, Any]) -> str:
    """A few rows of the groups that people run."""
    lines = []
    for key in (key for key in SHOWN[section] if key in groups):
        rows = {
            name.removesuffix(", compact"): row for name, row in timed_rows(groups[key]).items()
        }
        for name in (name for name in (*_ROWS, fastest_hf(rows)) if name in rows):
            row = rows[name]
            line = {"tokens": key.split()[1], "row": name, "ms": f"{row['seconds'] * 1e3:,.1f}"}
            line["time / dense"] = f"{ratio(row):.2f}"
            line["95 %"] = "" if name == "dense" else _range(interval(row))
            line["exact FLOPs saved"] = percent(row.get("exact_flops_saved"))
            if section == "decode":
                kv = row.get("kv_bytes")
                line["KV, MB"] = f"{kv / 1e6:.1f}" if kv else ""
            lines.append(line)
    return markdown(pd.DataFrame(lines))
