"""From what `benchmarks.ablation` measured to its rows, and the synergy of each decomposition."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import latency_headline
from benchmarks.ablation_rows import Case
from benchmarks.mechanism_tables import paired_change

SAVED = (
    "exact_flops_saved",
    "paper_flops_saved",
    "paper_flops_saved_16bit",
    "layer_tokens_saved",
    "kv_bytes_saved",
)
# What a synergy is formed of: shares of the dense model, and perplexity.
ADDED_UP = (*SAVED, "kv_bytes_allocated_saved", "time_saved", "ppl_increase")


def row(
    case: Case, about: Mapping[str, Any], measured: dict[str, Any], dense: dict[str, Any]
) -> dict[str, Any]:
    """One row of the result.

    Shares are of what the mechanisms may act on: the prompts under "continuation", else everything.

    Args:
      case: What ran.
      about: "data", "protocol" and further fields to be kept.
      measured: "nll", "tokens" and "saved" of `benchmarks.mechanisms.score_row`.
      dense: The same of the dense model, on the same windows or more.
    """
    change = paired_change(measured, dense)
    shares = measured["saved"]["prefill"]
    return {
        "name": case.name,
        "mechanisms": case.mechanisms,
        "kind": case.kind,
        "settings": case.source,
        "sweep": case.sweep,
        "values": {k: v if math.isfinite(v) else None for k, v in case.values.items()},
        "whole": case.whole,
        **about,
        "windows": len(measured["nll"]),
        "ppl": change.perplexity,
        "dense_ppl": change.dense,
        "ppl_increase": change.increase,
        "interval": change.interval,
        **{name: shares[name] for name in SAVED},
        "added_flops_share": shares["added_flops_share"],
        "simulated": True,
        **timed(None, None),
    }


def timed(own: dict[str, Any] | None, dense: dict[str, Any] | None) -> dict[str, Any]:
    """Fields of a row's times.

    Args:
      own: Row of `benchmarks.latency_runs.measure`; None where it was not timed.
      dense: Its row of the dense model.

    Returns:
      Seconds of a prefill (medians), of the dense model's beside it, the share saved, compile time,
      and the share of the dense cache's bytes that was not allocated; all None if not timed.
    """
    names = ("seconds", "dense_seconds", "time_saved", "compile_seconds")
    if own is None or dense is None or "runs" not in own:
        return dict.fromkeys((*names, "kv_bytes_allocated_saved", "timed_mechanisms"))
    return {
        "seconds": own["seconds"],
        "dense_seconds": own.get("baseline_seconds", dense["seconds"]),
        "time_saved": 1 - latency_headline.ratio(own, dense),
        "compile_seconds": own["compile_seconds"],
        "kv_bytes_allocated_saved": 1 - own["kv_bytes"] / dense["kv_bytes"],
        "timed_mechanisms": own["mechanisms"],
    }


def synergies(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What all mechanisms of some settings save together, less the sum of what each saves alone.

    The paper's delta_synergy (P.1): positive where together they save more. The same is formed of
    the perplexity increase, where positive means that together they cost more.

    Returns:
      One entry for each settings, data and protocol whose whole and parts are all among the rows:
      "whole", "parts" by letter, "sum_of_parts" and "synergy", each by figure; None where a figure
      was not measured.
    """
    return list(_synergies(rows))


def _synergies(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for whole in rows:
        if not whole["whole"]:
            continue
        same = ("settings", "data", "protocol")
        parts = {
            other["name"]: other
            for other in rows
            if other["kind"] == "isolated" and all(other[n] == whole[n] for n in same)
        }
        if not parts or not set(parts) >= set(whole["name"].split("+")) - {"K"}:
            continue
        entry: dict[str, Any] = {name: whole[name] for name in (*same, "name")}
        for name in ("whole", "parts", "sum_of_parts", "synergy"):
            entry[name] = {}
        for figure in ADDED_UP:
            alone = {letter: part[figure] for letter, part in parts.items()}
            known = whole[figure] is not None and None not in alone.values()
            total = math.fsum(alone.values()) if known else None
            entry["whole"][figure] = whole[figure]
            entry["parts"][figure] = alone
            entry["sum_of_parts"][figure] = total
            entry["synergy"][figure] = None if total is None else whole[figure] - total
        yield entry
