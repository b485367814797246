"""Ratios of measured rows, and the headline made of them.

A ratio of a row and its baseline is the median over rounds of the ratio to the mean of the
baseline's runs before and after the row's: what slows the machine down for a while slows both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

from benchmarks.latency_cases import FRACTIONS, HEADLINE, key_of

# A decode's limit, a row timed in turn with the others: the bandwidth of a shared machine changes
# from minute to minute.
READ_ROW = "weights and cache read once, float32"

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


def dense_name(dtype: str) -> str:
    """Name of the dense row of a dtype."""
    return f"dense, {dtype}"


# Scopes of `benchmarks.components` that decide: drifts and entropies, who halts, who fuses.
DECIDING = ("signals", "halt", "fuse")


def met(name: str, value: float) -> bool:
    """Whether a headline figure meets its target."""
    sign, target, _ = TARGETS[name]
    return value >= target if sign == ">=" else value <= target


def ratio(row: dict[str, Any], baseline: dict[str, Any], time: str = "seconds") -> float:
    """Median over rounds of a row's time over its baseline's around it."""
    return median(_ratios(row, baseline, time))


def _ratios(row: dict[str, Any], baseline: dict[str, Any], time: str) -> list[float]:
    runs = row["runs"]
    beside = runs.get(f"baseline_{time}", baseline["runs"][time])
    return [a / b for a, b in zip(runs[time], beside, strict=True)]


def interval(
    row: dict[str, Any], baseline: dict[str, Any], time: str = "seconds"
) -> tuple[float, float] | None:
    """Where the median of `ratio` lies with 95 % confidence; None of fewer than six runs.

    Of n ordered ratios the k-th from either end: fewer than k of n lie on one side of the true
    median with a probability of P(Binomial(n, 1/2) < k), at most 0.025.
    """
    from scipy.stats import binom

    ratios = sorted(_ratios(row, baseline, time))
    k = int(binom.ppf(0.025, len(ratios), 0.5))
    return (ratios[k - 1], ratios[-k]) if k else None


def conversion(row: dict[str, Any], dense: dict[str, Any]) -> float | None:
    """(share of the dense time saved) / (share of the exact dense FLOPs saved); None if none are.

    Both shares are of the same program: prompts through all layers, the head at one position a row.
    Signals are charged in the FLOPs as well as in the time.
    """
    saved = row["exact_flops_saved"]
    return _converted(saved, ratio(row, dense)) if saved > 0 else None


def _converted(saved: float, ratio: float) -> float:
    return (1 - ratio) / saved


def measured(group: dict[str, Any] | None) -> dict[str, Any]:
    """Rows of a group that have times."""
    return {name: row for name, row in (group or {}).get("rows", {}).items() if "runs" in row}


def fastest_hf(rows: dict[str, Any]) -> str | None:
    """Name of the fastest Hugging Face row."""
    names = [name for name in rows if name.startswith("HF ")]
    return min(names, key=lambda name: rows[name]["seconds"], default=None)


class Figure(NamedTuple):
    """One measurement that a headline figure may be chosen from.

    Attributes:
      name: Of the headline figure.
      where: Group and row.
      value: What was measured.
      interval: Where it lies with 95 % confidence; None unless it comes from six ratios or more.
    """

    name: str
    where: str
    value: float
    interval: tuple[float, float] | None = None


def figures(results: dict[str, Any]) -> list[Figure]:
    """Every figure that a headline figure is chosen from."""
    return list(_figures(results))


def details(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Values of `figures`, by the headline's name."""
    out: dict[str, dict[str, float]] = {}
    for figure in _figures(results):
        out.setdefault(figure.name, {})[figure.where] = figure.value
    return out


def worst(results: dict[str, Any]) -> dict[str, Figure | None]:
    """The worst of each headline figure's; None where nothing was measured."""
    found = figures(results)
    out: dict[str, Figure | None] = {}
    for name, (sign, _, _) in TARGETS.items():
        ours = [figure for figure in found if figure.name == name]
        choose = min if sign == ">=" else max
        out[name] = choose(ours, key=lambda figure: figure.value, default=None)
    return out


def headline(results: dict[str, Any]) -> dict[str, float | None]:
    """The values of `worst`."""
    found = worst(results).items()
    return {name: None if figure is None else figure.value for name, figure in found}


def _of_ratio(
    name: str,
    where: str,
    row: dict[str, Any],
    dense: dict[str, Any],
    of: Callable[[float], float] = float,
    time: str = "seconds",
) -> Figure:
    """A figure that rises or falls with one ratio."""
    bounds = interval(row, dense, time)
    ends = None if bounds is None else sorted(map(of, bounds))
    value = of(ratio(row, dense, time))
    return Figure(name, where, value, None if ends is None else (ends[0], ends[1]))


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    groups = results.get("groups", {})
    yield from _signals(results.get("deciding", {}))
    for size in HEADLINE:
        yield from _prefill(
            key_of("prefill", *size), measured(groups.get(key_of("prefill", *size)))
        )
    for key, group in groups.items():
        rows = measured(group)
        if group.get("section") == "decode" and "dense" in rows:
            yield from _kv(key, rows)
            if group["batch"] == 1 and key == _first_decode(groups):
                yield from _decode(key, rows)


def _signals(deciding: dict[str, Any]) -> Iterator[Figure]:
    """From profiles of prefills that decide and stop nothing, and of the dense one."""
    for preset, parts in deciding.items():
        if preset != "dense":
            spent = sum(parts.get(scope, 0.0) for scope in DECIDING)
            share = spent / sum(deciding["dense"].values())
            yield Figure("signal_share", f"prefill, {preset}", share)


def _first_decode(groups: dict[str, Any]) -> str | None:
    """The shortest context measured at batch 1: the headline's."""
    keys = [
        (group["length"], key)
        for key, group in groups.items()
        if group.get("section") == "decode" and group["batch"] == 1 and "dense" in measured(group)
    ]
    return min(keys)[1] if keys else None


def _prefill(key: str, rows: dict[str, Any]) -> Iterator[Figure]:
    dense = rows.get("dense")
    if dense is None:
        return
    for fraction in (f for f in FRACTIONS if f <= 0.75):
        row = rows.get(f"active {fraction:g}")
        saved = row["exact_flops_saved"] if row is not None else 0
        if row is not None and saved > 0:
            where = f"{key}, active {fraction:g}"
            yield _of_ratio(
                "conversion_efficiency", where, row, dense, functools.partial(_converted, saved)
            )
    if "off" in rows:
        yield _of_ratio("off_over_dense", key, rows["off"], dense)
    for name, row in rows.items():
        saves = row.get("layer_tokens_saved", 1.0) > 0
        ours = name == "unmet thresholds" or name.startswith("active")
        ours |= name.endswith((", compact", ", decisions only"))
        if ours and not saves:
            yield _of_ratio("no_saving_over_dense", f"{key}, {name}", row, dense)
    hf = fastest_hf(rows)
    if hf is not None:
        yield _of_ratio("prefill_hf_over_ours", f"{key}, {hf}", rows[hf], dense)


def _decode(key: str, rows: dict[str, Any]) -> Iterator[Figure]:
    dense = rows["dense"]
    hf = fastest_hf(rows)
    if hf is not None:
        yield _of_ratio("decode_ours_over_hf", f"{key}, {hf}", rows[hf], dense, time="call_seconds")
    if "half depth" in rows:
        yield _of_ratio(
            "half_depth_decode_speedup", key, rows["half depth"], dense, lambda r: 1 / r
        )
    exact = rows.get(dense_name("float32"), dense)
    if READ_ROW in rows and exact.get("dtype", "float32") == "float32":
        # All are timed beside the dense row.
        value = ratio(rows[READ_ROW], dense)
        if exact is not dense:
            value /= ratio(exact, dense)
        yield Figure("decode_bandwidth_fraction", key, value)


UNKNOWN = "a processor that was not noted"


def processor_of(part: dict[str, Any]) -> str:
    """The processor that a group, or the last run, was measured on."""
    return part["machine"].get("processor", UNKNOWN)


def peaks(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The best of each processor in any of the runs that made a file.

    A run that shares the machine sees less of it, and a share of that would flatter.
    """
    out: dict[str, dict[str, float]] = {}
    for part in (*results.get("groups", {}).values(), results):
        if part.get("machine"):
            best = out.setdefault(processor_of(part), {})
            for name in ("gemm_flops", "bandwidth"):
                best[name] = max(best.get(name, 0.0), part["machine"][name])
    return out


def step_bytes(batch: int, length: int, about: dict[str, Any]) -> int:
    """What a decoding step in float32 reads at least: every weight, key and value, once.

    Args:
      batch: Rows.
      length: Tokens of the prompts; with half of the new tokens the context, on average.
      about: Has "dtype", "new_tokens", "weight_bytes" and "kv_bytes_per_token".
    """
    context = length + about["new_tokens"] / 2
    own = about["weight_bytes"] + batch * context * about["kv_bytes_per_token"]
    return int(own * (1 if about["dtype"] == "float32" else 2))


def _kv(key: str, rows: dict[str, Any]) -> Iterator[Figure]:
    dense = rows["dense"].get("kv_bytes")
    for name, row in rows.items():
        rate = row.get("kv_skip_rate") or 0.0
        if dense and "kv_bytes" in row and rate > 0:
            value = (1 - row["kv_bytes"] / dense) / rate
            yield Figure("kv_bytes_over_skip_rate", f"{key}, {name}", value)
