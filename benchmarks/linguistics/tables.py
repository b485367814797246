"""Tables of docs/linguistics.md from the result file, the paper's figures beside ours."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.linguistics.classes import CATEGORIES, CONTENT, FUNCTION

# Per cent of tokens halted by layer 15 and their number (Tables 2, 8 and 12).
PAPER_HALTED = dict(
    zip(
        CATEGORIES,
        ((91.4, 1204), (87.2, 986), (89.6, 412), (74.8, 705), (68.3, 893), (18.5, 9710)),
        strict=True,
    )
)
# Per cent of fused and of random pairs inside a constituent, by layer (Tables 9 and 13).
PAPER_FUSED = {12: (78.9, 48.2), 15: (81.2, 47.3), 20: (84.5, 49.8)}
# Keys of the rows that tables name.
PERCENTILES_ROW = "percentiles | percentiles, H+K | teacher-forced"
FUSION_ROW = "percentiles | percentiles, F | teacher-forced"
BALANCED_ROW = "presets | balanced | continuation"


def make_tables(content: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """Each table of the page by its name."""
    part = content["corpora"]["treebank"]
    return {
        "parts of speech": _halting(part["rows"]),
        "constituents": _fusion(part),
        "predictions": _predictions(part["rows"]),
        "predictions by depth": _by_depth(part["rows"][PERCENTILES_ROW]),
    }


def _share(entry: dict[str, Any]) -> str:
    if entry["share"] is None:
        return "-"
    low, high = entry["interval"]
    return f"{entry['share']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _classes(row: dict[str, Any]) -> dict[str, Any]:
    """Halting by the classes of the paper, then of function and content words."""
    paper, side = row["halting"]["paper"], row["halting"]["side"]
    return {**paper, **{name: side[name] for name in (FUNCTION, CONTENT)}}


def _halting(rows: dict[str, Any]) -> pd.DataFrame:
    """The paper's figure, the share halted by the middle layer and at all, and mean depths."""
    middle = rows[PERCENTILES_ROW]["middle_layer"]
    percentiles, balanced = (_classes(rows[key]) for key in (PERCENTILES_ROW, BALANCED_ROW))
    lines = [
        {
            "class": name,
            "paper": f"{PAPER_HALTED[name][0]}%" if name in PAPER_HALTED else "",
            "tokens": f"{entry['halted']['count']:,}",
            f"percentiles, by layer {middle}": _share(entry["halted_by_middle"]),
            "percentiles": _share(entry["halted"]),
            "`balanced`: mean depth": _mean(balanced[name]["mean_depth"]),
        }
        for name, entry in percentiles.items()
        if entry["halted"]["count"]
    ]
    return pd.DataFrame(lines)


def _fusion(part: dict[str, Any]) -> pd.DataFrame:
    """Shares of fused pairs inside a constituent, against all adjacent pairs, by layer."""
    fused = part["rows"][FUSION_ROW]["fusion"]
    groups = [("all adjacent (our baseline)", "", fused["baseline"])]
    sources = {"criterion alone, dense states": part["criterion"], "percentiles, F": fused}
    for source, by_layer in sources.items():
        groups += [(source, key.split()[1], by_layer[key]) for key in by_layer if "layer" in key]
    lines = []
    for source, layer, entry in groups:
        paper = [f"{value}%" for value in PAPER_FUSED.get(int(layer or 0), ())] or ["", ""]
        line = {"pairs": source, "layer": layer}
        line |= dict(zip(("paper: fused", "paper: random"), paper, strict=True))
        line["in a phrase"] = _share(entry["all"]["phrase"])
        line["in a base phrase"] = _share(entry["all"]["base"])
        lines.append(line | {"across words: in a phrase": _share(entry["across"]["phrase"])})
    return pd.DataFrame(lines)


def _changes(entry: dict[str, Any]) -> dict[str, str]:
    """Accuracy of the dense model, and what changes, with intervals."""
    cells = {"dense accuracy": "-", "change, points": "-", "change of NLL, nats": "-"}
    if entry["tokens"]:
        cells["dense accuracy"] = f"{entry['dense_accuracy']:.1%}"
        for head, name, unit, digits in (
            ("change, points", "accuracy", 100, 1),
            ("change of NLL, nats", "nll", 1, 2),
        ):
            values = [entry[f"{name}_change"], *(entry[f"{name}_interval"] or [])]
            shown, *ends = [f"{unit * value:+.{digits}f}" for value in values]
            cells[head] = shown + (f" ({' to '.join(ends)})" if ends else "")
    return cells


def _predictions(rows: dict[str, Any]) -> pd.DataFrame:
    """What became of next-token prediction, by the kind of the predicted word."""
    lines = []
    for key in (PERCENTILES_ROW, FUSION_ROW, BALANCED_ROW):
        _, name, protocol = key.split(" | ")
        for side in (FUNCTION, CONTENT):
            entry = rows[key]["prediction"]["predicted"]["side"][side]
            line = {"configuration": name, "protocol": protocol, "predicted word": side}
            lines.append(line | _changes(entry))
    return pd.DataFrame(lines)


def _by_depth(row: dict[str, Any]) -> pd.DataFrame:
    """Figs. 3 and 18: by the word whose state was read, and the layer it stopped after."""
    lines = []
    for side in (FUNCTION, CONTENT):
        by_depth = row["prediction"]["read"]["side"][side]["depth"]
        for depth in sorted(by_depth, key=int):
            line = {"word that was read": side, "halted after layer": depth}
            entry = by_depth[depth]
            lines.append(line | {"tokens": f"{entry['tokens']:,}"} | _changes(entry))
    return pd.DataFrame(lines)
