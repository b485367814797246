"""Tables of docs/mechanisms.md from the result file of `benchmarks.mechanisms`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qs_jax.evaluation.perplexity import interval

_COLUMNS = (
    "perplexity, 95 % interval",
    "change, 95 % interval",
    "layer-tokens",
    "exact FLOPs",
    "paper FLOPs",
)
_SHARES = ("layer_tokens_saved", "exact_flops_saved", "paper_flops_saved", "kv_bytes_saved")


def _line(row: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    mine = np.array(row["nll"]) / np.array(row["tokens"])
    theirs = np.array(dense["nll"]) / np.array(dense["tokens"])
    perplexity, base = np.exp(mine.mean()), np.exp(theirs.mean())
    # Paired by window: the spread between texts drops out.
    low, high = (base * (ratio - 1) for ratio in interval(mine - theirs))
    change = f"{perplexity - base:+.2f} ({low:+.2f} to {high:+.2f})"
    if np.array_equal(mine, theirs):
        change = "none"
    elif perplexity > 10 * base:
        change = f"{perplexity - base:+,.0f}"
    lowest, highest = interval(mine)
    shown = f"{perplexity:.4g} ({lowest:.3g} to {highest:.3g})"
    saved = row["saved"]
    cells = [shown, change]
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
