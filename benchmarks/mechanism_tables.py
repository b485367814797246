"""Tables of docs/mechanisms.md from the result file of `benchmarks.mechanisms`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qs_jax.evaluation.perplexity import exp, interval

_COLUMNS = (
    "perplexity, 95 % interval",
    "change, 95 % interval",
    "layer-tokens",
    "exact FLOPs",
    "paper FLOPs",
)
_SHARES = ("layer_tokens_saved", "exact_flops_saved", "paper_flops_saved", "kv_bytes_saved")


class Change(NamedTuple):
    """A row against the dense model on the same windows; None beyond the range of float64.

    Attributes:
      perplexity: Of the row.
      dense: Of the dense model.
      increase: Their difference.
      interval: 95 % interval of `increase`, paired by window: the spread between texts drops out.
        None for a single window.
    """

    perplexity: float | None
    dense: float
    increase: float | None
    interval: list[float | None] | None


def paired_change(row: dict[str, Any], dense: dict[str, Any]) -> Change:
    """Perplexity and its increase, from "nll" and "tokens" of each window.

    The dense row may hold more windows: as many are taken as the row has, from the start.
    """
    count = len(row["nll"])
    mine = np.array(row["nll"]) / np.array(row["tokens"])
    theirs = np.array(dense["nll"][:count]) / np.array(dense["tokens"][:count])
    base, perplexity = exp(float(theirs.mean())), exp(float(mine.mean()))
    assert base is not None
    ratios = interval(mine - theirs)
    return Change(
        perplexity,
        base,
        None if perplexity is None else perplexity - base,
        ratios and [None if ratio is None else base * (ratio - 1) for ratio in ratios],
    )


def told(change: Change) -> str:
    """The increase and its interval as a cell of a table."""
    if change.perplexity is None or change.increase is None:
        return "beyond float64"
    if change.increase == 0 and change.interval in (None, [0, 0]):
        return "none"
    if change.perplexity > 10 * change.dense:
        return f"{change.increase:+,.0f}"
    ends = [end for end in change.interval or () if end is not None]
    return f"{change.increase:+.2f}" + (f" ({ends[0]:+.2f} to {ends[1]:+.2f})" if ends else "")


def _line(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    mine = np.array(row["nll"]) / np.array(row["tokens"])
    found = paired_change(row, dense)
    lowest, highest = interval(mine) or (None, None)
    shown = f"{found.perplexity:.4g} ({lowest:.3g} to {highest:.3g})"
    saved = row["saved"]
    cells = [shown, told(found)]
    shares = [saved["prefill"][name] for name in (*_SHARES, "paper_flops_saved_16bit")]
    return cells + [f"{share:.1%}".replace("-0.0%", "0.0%") for share in shares]


def render(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and Markdown of each table."""
    rows, about = content["rows"], content["about"]
    dense = {
        protocol: rows[f"presets | off | {protocol}"]
        for protocol in ("teacher-forced", "continuation")
        if f"presets | off | {protocol}" in rows
    }
    sections: dict[str, list[list[str]]] = {}
    for key, row in rows.items():
        section, *name, protocol = key.split(" | ")
        cells = [", ".join(name), protocol, *_line(row, dense[protocol])]
        sections.setdefault(section, []).append(cells)
    head = ["", "protocol", *_COLUMNS, "KV held", "paper FLOPs, 16 bit"]
    for section, lines in sections.items():
        table = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
        table += ["| " + " | ".join(cells) + " |" for cells in lines]
        yield section, "\n".join(table)
    if "fitted" in content:
        yield "fitted", _fitted(content["fitted"])
    yield "about", _about(about, content["environment"])


def _fitted(fitted: dict[str, Any]) -> str:
    lines = ["| layer | " + " | ".join(map(str, fitted["layers"])) + " |"]
    lines.append("|---|" + "---:|" * len(fitted["layers"]))
    for name, label in (
        ("tau_drift", "25th percentile of raw drift"),
        ("tau_halt", "25th percentile of lens entropy, nats"),
    ):
        lines.append(f"| {label} | " + " | ".join(f"{x:.3g}" for x in fitted[name]) + " |")
    drift = fitted["median_drift"]
    lines.append("")
    lines.append(
        f"Median raw drift of a layer: {min(drift):.0f} to {max(drift):.0f}. 15th percentile of "
        f"the raw distance of adjacent tokens at layers 10, 15 and 20: {fitted['tau_fuse']:.0f}."
    )
    return "\n".join(lines)


def _about(about: dict[str, Any], made_with: dict[str, Any]) -> str:
    packages = made_with["packages"]
    return (
        f"{about['model']}, {about['text']} (first {about['windows']} windows of "
        f"{about['seq_len']} tokens; maps from the {about['fit_windows']} windows after them, "
        f"percentiles from the first 4 of those), {about['dtype']}, batch {about['batch_size']}, "
        f"Python {made_with['python']}, jax {packages['jax']}, {made_with['processor']}, "
        f"{made_with['cores']} cores, commit {made_with['commit']}."
    )


def replace(page: Path, name: str, table: str) -> None:
    """Put a table between its two markers on a page; a page without them is left alone."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    page.write_text(
        pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text), encoding="utf-8"
    )
