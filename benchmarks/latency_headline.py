"""Ratios of measured rows, and the headline made of them.

A ratio of a row and its baseline is the median over rounds of the ratio to the mean of the
baseline's runs before and after the row's: what slows the machine down for a while slows both.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.latency_cases import FRACTIONS, HEADLINE, SHIPPED, key_of

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
    "signal_share": ("<=", 0.02, "time of decisions that stop nothing / dense, the worst preset"),
    "kv_bytes_over_skip_rate": (">=", 0.9, "share of KV bytes not allocated / of keys skipped"),
}


def dense_name(dtype: str) -> str:
    """Name of the dense row of a dtype."""
    return f"dense, {dtype}"


def met(name: str, value: float) -> bool:
    """Whether a headline figure meets its target."""
    sign, target, _ = TARGETS[name]
    return value >= target if sign == ">=" else value <= target


def ratio(row: dict[str, Any], baseline: dict[str, Any], time: str = "seconds") -> float:
    """Median over rounds of a row's time over its baseline's around it."""
    runs = row["runs"]
    beside = runs.get(f"baseline_{time}", baseline["runs"][time])
    return median(a / b for a, b in zip(runs[time], beside, strict=True))


def conversion(row: dict[str, Any], dense: dict[str, Any]) -> float | None:
    """(share of the dense time saved) / (share of the exact dense FLOPs saved); None if none are.

    Both shares are of the same program: prompts through all layers, the head at one position a row.
    Signals are charged in the FLOPs as well as in the time.
    """
    saved = row["exact_flops_saved"]
    return (1 - ratio(row, dense)) / saved if saved > 0 else None


def measured(group: dict[str, Any] | None) -> dict[str, Any]:
    """Rows of a group that have times."""
    return {name: row for name, row in (group or {}).get("rows", {}).items() if "runs" in row}


def fastest_hf(rows: dict[str, Any]) -> str | None:
    """Name of the fastest Hugging Face row."""
    names = [name for name in rows if name.startswith("HF ")]
    return min(names, key=lambda name: rows[name]["seconds"], default=None)


def details(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Every figure that a headline figure is chosen from, by the headline's name."""
    out: dict[str, dict[str, float]] = {}
    for name, where, value in _figures(results):
        out.setdefault(name, {})[where] = value
    return out


def headline(results: dict[str, Any]) -> dict[str, float | None]:
    """The worst of each figure's details; None where nothing was measured."""
    found = details(results)
    out: dict[str, float | None] = {}
    for name, (sign, _, _) in TARGETS.items():
        values = found.get(name, {}).values()
        out[name] = (min if sign == ">=" else max)(values, default=None)
    return out


def _figures(results: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    groups = results.get("groups", {})
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


def _first_decode(groups: dict[str, Any]) -> str | None:
    """The shortest context measured at batch 1: the headline's."""
    keys = [
        (group["length"], key)
        for key, group in groups.items()
        if group.get("section") == "decode" and group["batch"] == 1 and "dense" in measured(group)
    ]
    return min(keys)[1] if keys else None


def _prefill(key: str, rows: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    dense = rows.get("dense")
    if dense is None:
        return
    for fraction in (f for f in FRACTIONS if f <= 0.75):
        row = rows.get(f"active {fraction:g}")
        value = conversion(row, dense) if row is not None else None
        if value is not None:
            yield "conversion_efficiency", f"{key}, active {fraction:g}", value
    if "off" in rows:
        yield "off_over_dense", key, ratio(rows["off"], dense)
    for name, row in rows.items():
        saves = row.get("layer_tokens_saved", 1.0) > 0
        ours = name == "unmet thresholds" or name.endswith(", compact") or name.startswith("active")
        if ours and not saves:
            yield "no_saving_over_dense", f"{key}, {name}", ratio(row, dense)
    for preset in SHIPPED:
        row = rows.get(f"{preset}, decisions only")
        if row is not None:
            yield "signal_share", f"{key}, {preset}", ratio(row, dense) - 1
    hf = fastest_hf(rows)
    if hf is not None:
        yield "prefill_hf_over_ours", f"{key}, {hf}", ratio(rows[hf], dense)


def _decode(key: str, rows: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    dense = rows["dense"]
    hf = fastest_hf(rows)
    if hf is not None:
        yield "decode_ours_over_hf", f"{key}, {hf}", ratio(rows[hf], dense, "call_seconds")
    if "half depth" in rows:
        yield "half_depth_decode_speedup", key, 1 / ratio(rows["half depth"], dense)
    exact = rows.get(dense_name("float32"), dense)
    if READ_ROW in rows and exact.get("dtype", "float32") == "float32":
        # All are timed beside the dense row.
        value = ratio(rows[READ_ROW], dense)
        if exact is not dense:
            value /= ratio(exact, dense)
        yield "decode_bandwidth_fraction", key, value


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


def _kv(key: str, rows: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    dense = rows["dense"].get("kv_bytes")
    for name, row in rows.items():
        rate = row.get("kv_skip_rate") or 0.0
        if dense and "kv_bytes" in row and rate > 0:
            value = (1 - row["kv_bytes"] / dense) / rate
            yield "kv_bytes_over_skip_rate", f"{key}, {name}", value
