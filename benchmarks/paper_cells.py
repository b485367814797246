"""Each table of the paper beside ours, as Markdown, from the result files.

A figure that no file holds is a cell that names the command which measures it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import paper_quotes as paper
from benchmarks.linguistics_tables import (
    AGGRESSIVE_ROW,
    BALANCED_ROW,
    FUSION_ROW,
    PAPER_FUSED,
    PAPER_HALTED,
    PAPER_ROW,
    PERCENTILES_ROW,
    table,
)
from benchmarks.mechanism_tables import Change, paired_change, told

# Result files, and what makes them.
COMMANDS = {
    "ablation": "python -m benchmarks.ablation",
    "mechanisms": "python -m benchmarks.mechanisms",
    "latency": "python -m benchmarks.latency",
    "linguistics": "python -m benchmarks.linguistics",
    "tasks": "python -m benchmarks.tasks",
    "calibration": "python -m benchmarks.calibrated",
    "carbon": "python -m benchmarks.carbon",
}
Results = Mapping[str, Any]


def missing(name: str) -> str:
    """Cell of a figure that a file does not hold."""
    return f"not measured: `{COMMANDS[name]}`"


def dig(content: Any, *keys: Any) -> Any:
    """An entry of nested dicts; None where there is none."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def share(value: float | None, file: str = "ablation") -> str:
    """A share as a cell, in per cent."""
    return missing(file) if value is None else f"{value:.1%}".replace("-0.0%", "0.0%")


def increase(row: Mapping[str, Any] | None) -> str:
    """Perplexity increase of a row of `benchmarks.ablation`, with its interval."""
    if row is None:
        return missing("ablation")
    ends = [row["ppl_increase"], *(row["interval"] or [])]
    if all(end is not None and abs(end) < 0.005 for end in ends):
        return "0.00"
    return told(Change(row["ppl"], row["dense_ppl"], row["ppl_increase"], row["interval"]))


def interval_share(entry: Any) -> str:
    """A share of `benchmarks.linguistics` with its interval."""
    if dig(entry, "share") is None:
        return missing("linguistics") if entry is None else "none of these tokens"
    low, high = entry["interval"]
    return f"{entry['share']:.1%} ({low:.1%} to {high:.1%})"


def find(results: Results, **fields: Any) -> dict[str, Any] | None:
    """The first row of the ablation with these fields."""
    rows = dig(results.get("ablation"), "rows") or []
    return next((row for row in rows if all(row.get(n) == v for n, v in fields.items())), None)


def halting(results: Results) -> str:
    """Tables 2, 8 and 12: halting by part of speech."""
    rows = dig(results.get("linguistics"), "corpora", "treebank", "rows")
    staged = {"balanced": BALANCED_ROW, "aggressive": AGGRESSIVE_ROW}
    middle = dig(rows, PERCENTILES_ROW, "middle_layer")
    shown = "the middle layer" if middle is None else f"layer {middle}"
    head = ["class", "paper, by layer 15", "paper, tokens", "our tokens", "paper's thresholds"]
    head += [f"its percentiles, by {shown}", "its percentiles, at all"]
    head += [f"`{name}`: mean depth" for name in staged]
    lines = []
    for name, (halted, tokens) in PAPER_HALTED.items():

        def entry(key: str, which: str = "halted", name: str = name) -> Any:
            return dig(rows, key, "halting", "paper", name, which)

        count = dig(entry(PERCENTILES_ROW), "count")
        cells = [name, f"{halted}%", f"{tokens:,}"]
        cells.append(missing("linguistics") if count is None else f"{count:,}")
        cells.append(interval_share(entry(PAPER_ROW)))
        cells.append(interval_share(entry(PERCENTILES_ROW, "halted_by_middle")))
        cells.append(interval_share(entry(PERCENTILES_ROW)))
        for key in staged.values():
            depth = entry(key, "mean_depth")
            cells.append(missing("linguistics") if depth is None else f"{depth:.1f}")
        lines.append(cells)
    return table(head, lines)


def fusion(results: Results) -> str:
    """Tables 9 and 13: fused pairs inside a constituent."""
    part = dig(results.get("linguistics"), "corpora", "treebank")
    fused = dig(part, "rows", FUSION_ROW, "fusion")
    head = ["layer", "paper: fused", "paper: random pairs"]
    ways = {
        "in one phrase": ("all", "phrase"),
        "right under one phrase": ("all", "base"),
        "across words, in one phrase": ("across", "phrase"),
    }
    head += [f"{way}: {which}" for way in ways for which in ("fused", "all neighbours")]
    lines = []
    for layer, (hit, random) in PAPER_FUSED.items():
        cells = [str(layer), f"{hit}%", f"{random}%"]
        for way in ways.values():
            cells.append(interval_share(dig(part, "criterion", f"layer {layer}", *way)))
            cells.append(interval_share(dig(fused, "baseline", *way)))
        lines.append(cells)
    return table(head, lines)


_BITS = ("", "8 bits", "2/4/8 bits (1.0, 2.3)", "4/8 bits (2.3)", "2/4 bits (1.2)")
_TEACHER = ("", "8 bits", "adaptive, nats (1.0, 2.3)", "adaptive, no 2 bits", None)


def bits(results: Results) -> str:
    """Tables 3 and 10: bits by entropy."""
    head = ["strategy", "bits", "paper: perplexity", "paper: FLOPs saved"]
    head += ["ours: increase, continuation", "ours: paper's account, 16 bit"]
    head += ["ours: paper's account, 8 bit", "ours: exact FLOPs"]
    head += ["ours, rotated: increase, teacher-forced"]
    rows, lines = dig(results.get("mechanisms"), "rows"), []
    base = paper.BITS_3[0].ppl
    for quoted, name, other in zip(paper.BITS_3, _BITS, _TEACHER, strict=True):
        cells = [quoted.strategy, quoted.bits, f"{quoted.ppl} ({quoted.ppl - base:+.1f})"]
        cells.append(f"{quoted.flops_saved}%")
        if not name:
            lines.append([*cells, "none", "0.0%", "0.0%", "0.0%", "none"])
            continue
        row = find(results, kind="sweep", sweep="bits", name=name)
        cells.append(increase(row))
        for figure in ("paper_flops_saved_16bit", "paper_flops_saved", "exact_flops_saved"):
            cells.append(share(dig(row, figure)))
        teacher = dig(rows, f"bits | {other} | teacher-forced")
        dense = dig(rows, "presets | off | teacher-forced")
        if other is None:
            cells.append("not scored")
        elif teacher is None or dense is None:
            cells.append(missing("mechanisms"))
        else:
            cells.append(told(paired_change(teacher, dense)))
        lines.append(cells)
    return table(head, lines)


def tasks(results: Results) -> str:
    """Table 4: GLUE and SuperGLUE."""
    runs = list(_task_runs(results.get("tasks")))
    head = ["task", "paper: dense", "paper: QuickSilver", "paper: change", "run", "examples"]
    head += ["ours: dense", "ours: with mechanisms", "ours: change", "exact FLOPs saved"]
    lines = []
    for name, (label, dense, other) in paper.TASKS_4.items():
        quoted = [label, str(dense), str(other), f"{other - dense:+.1f}"]
        found = [(run, content["tasks"][name]) for run, content in runs if name in content["tasks"]]
        for run, task in found:
            cells = [run, str(task["examples"]), _metric(task["dense"])]
            cells += [_metric(task.get("quicksilver")), _metric(task.get("difference"), "+")]
            cells.append(share(dig(task, "quicksilver", "saved", "exact_flops_saved"), "tasks"))
            lines.append([*quoted, *cells])
        if not found:
            lines.append([*quoted, *[missing("tasks")] * 6])
    return table(head, lines)


def _task_runs(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of `qs_jax tasks`, wherever in a file they stand."""
    if not isinstance(content, dict):
        return
    if isinstance(content.get("tasks"), dict) and "config" in content:
        config = content["config"]
        yield f"{config['preset']}, head {config['head']}", content
        return
    for value in content.values():
        yield from _task_runs(value)


def _metric(entry: Mapping[str, Any] | None, sign: str = "") -> str:
    if entry is None:
        return missing("tasks")
    shown = f"{100 * entry['value']:{sign}.1f}"
    if entry.get("interval") is None:
        return shown
    low, high = entry["interval"]
    return f"{shown} ({100 * low:{sign}.1f} to {100 * high:{sign}.1f})"


def walkthrough(results: Results) -> str:
    """Table 5: one sentence, token by token."""
    found = dig(results.get("ablation"), "walkthrough")
    head = ["token", "paper: halted at", "paper: bits", "layers run", "layers that hold its keys"]
    head += ["fused into", "bits"]
    if found is None:
        return table(head, [["all", "", "", *[missing("ablation")] * 4]])
    tokens, lines = found["tokens"], []
    for token in tokens:
        word, into = token["text"].strip(), token["fused_into"]
        quoted = [paper.HALTED_5.get(word, ""), paper.BITS_5.get(word, "")]
        cells = [f"`{word}`", *map(str, quoted), str(token["depth"]), str(token["kv_layers"])]
        cells.append("" if into is None else f"`{tokens[into]['text'].strip()}`")
        lines.append([*cells, str(token["bits"])])
    return table(head, lines)


# Scopes of `benchmarks.components` by the paper's names.
_SCOPES = {
    "token embedding": ("embed",),
    "self-attention": ("attn",),
    "feedforward network": ("mlp",),
    "KV cache write": ("kv_write",),
    "quantization overhead": ("amq",),
    "fusion branching logic": ("fuse",),
}
_KNOWN = {scope for scopes in _SCOPES.values() for scope in scopes}


def components(results: Results) -> str:
    """Table 7: milliseconds by component."""
    parts = dig(results.get("latency"), "components") or {}
    columns = ["dense prefill", "balanced, prefill", "aggressive, prefill"]
    head = ["milliseconds", "paper: dense", "paper: QuickSilver", "paper: saved"]
    head += [f"ours: {name}" for name in columns] + ["ours: saved by `aggressive`"]
    named = {**_SCOPES, "everything else": None, "total": None}
    lines = []
    for name, scopes in named.items():
        quoted = paper.COMPONENTS_7.get(name, (None, None, None))
        cells = [name, *("" if value is None else str(value) for value in quoted)]
        cells[-1] += "%" if cells[-1] else ""
        times = [_milliseconds(parts.get(column), name, scopes) for column in columns]
        cells += [missing("latency") if time is None else f"{time:,.1f}" for time in times]
        lines.append([*cells, _saved(times[0], times[-1])])
    return table(head, lines)


def _saved(dense: float | None, other: float | None) -> str:
    if dense is None or other is None:
        return missing("latency")
    return share(1 - other / dense) if dense else ""


def _milliseconds(part: Any, name: str, scopes: Sequence[str] | None) -> float | None:
    if part is None:
        return None
    if name == "total":
        return 1e3 * sum(part.values())
    if scopes is None:
        return 1e3 * sum(seconds for scope, seconds in part.items() if scope not in _KNOWN)
    return 1e3 * sum(part.get(scope, 0.0) for scope in scopes)


def ablation(results: Results) -> str:
    """Table 11: alone and added up."""
    head = ["technique", "", "paper: speedup", "paper: FLOPs", "paper: increase", "our settings"]
    head += ["time saved", *_SHARES.values(), "perplexity increase"]
    rows = dig(results.get("ablation"), "rows") or []
    there = list(dict.fromkeys(row["settings"] for row in rows if row["kind"] != "sweep"))
    lines = []
    for quoted in paper.ABLATION_11:
        cells = [quoted.technique, quoted.kind, f"{quoted.speedup:g}%", f"{quoted.flops_saved:g}%"]
        cells.append(f"{quoted.ppl_increase:+.2f}")
        for settings in there:
            row = _ablated(results, quoted, settings)
            if row is not None:  # else these settings have no such mechanism
                shares = [_kv_or_share(row, name) for name in _SHARES]
                lines.append([*cells, settings, _time(row), *shares, increase(row)])
        if not there:
            lines.append([*cells, "all", *[missing("ablation")] * (len(_SHARES) + 2)])
    return table(head, lines)


_SHARES = {
    "exact_flops_saved": "exact FLOPs saved",
    "paper_flops_saved": "paper's account, 8 bit",
    "paper_flops_saved_16bit": "16 bit",
    "kv_bytes_saved": "KV bytes saved, counted",
    "kv_bytes_allocated_saved": "allocated",
}


def _ablated(results: Results, quoted: paper.Ablated, settings: str) -> dict[str, Any] | None:
    name, data = "+".join(quoted.letters), _first_text(results)
    return find(results, kind=quoted.kind, name=name, settings=settings, data=data)


def _first_text(results: Results) -> str | None:
    return next(iter(dig(results.get("ablation"), "about", "texts") or {}), None)


def _untimed(row: dict[str, Any]) -> str:
    return f"not measured: `{COMMANDS['ablation']} --timed-settings {row['settings']}`"


def _kv_or_share(row: dict[str, Any], name: str) -> str:
    untimed = name == "kv_bytes_allocated_saved" and row[name] is None
    return _untimed(row) if untimed else share(row[name])


def _time(row: dict[str, Any]) -> str:
    if row["time_saved"] is None:
        return _untimed(row)
    left_out = set(row["mechanisms"]) - set(row["timed_mechanisms"])
    note = f", without {', '.join(sorted(left_out))}" if left_out else ""
    return f"{share(row['time_saved'])}{note}"


def synergy(results: Results) -> str:
    """P.1 and P.4: the whole less the sum of its parts."""
    head = ["", "data", "figure", "alone, added up", "together", "synergy"]
    alone = {row.letters: row for row in paper.ABLATION_11 if row.kind == "isolated"}
    whole, parts = paper.ABLATION_11[-1], alone.values()
    told_p4, of_each = paper.SYNERGY_P4
    quoted = {
        ("paper, Table 11", "FLOPs"): (sum(row.flops_saved for row in parts), whole.flops_saved),
        ("paper, Table 11", "speedup"): (sum(row.speedup for row in parts), whole.speedup),
        ("paper, P.4", "FLOPs"): (sum(of_each), told_p4),
    }
    lines = []
    for (source, figure), (total, joint) in quoted.items():
        shares = [f"{total:.1f}%", f"{joint:.1f}%", f"{joint - total:+.1f} points"]
        lines.append([source, "", figure, *shares])
    figures = {
        "exact_flops_saved": "exact FLOPs",
        "paper_flops_saved": "paper's account, 8 bit",
        "time_saved": "time",
        "ppl_increase": "perplexity increase",
    }
    entries = dig(results.get("ablation"), "synergy") or []
    for entry in entries:
        for figure, label in figures.items():
            total, joint = entry["sum_of_parts"][figure], entry["whole"][figure]
            if total is None:
                continue
            name = f"`{entry['settings']}`, {entry['name']}"
            cells = [name, entry["data"], label]
            if figure == "ppl_increase":
                cells += [f"{total:+.2f}", f"{joint:+.2f}", f"{joint - total:+.2f}"]
            else:
                cells += [share(total), share(joint), f"{100 * (joint - total):+.1f} points"]
            lines.append(cells)
    if not entries:
        lines.append(["ours", "", "all", *[missing("ablation")] * 3])
    return table(head, lines)


def texts(results: Results) -> str:
    """All mechanisms of each settings on each text; the paper names C4 but tabulates none of it."""
    head = ["settings", "mechanisms", "text", "dense perplexity", "increase", "exact FLOPs saved"]
    head += ["paper's account, 8 bit", "KV bytes saved"]
    rows = [row for row in dig(results.get("ablation"), "rows") or [] if row["whole"]]
    lines = [
        [
            row["settings"],
            row["name"],
            row["data"],
            f"{row['dense_ppl']:.2f}",
            increase(row),
            share(row["exact_flops_saved"]),
            share(row["paper_flops_saved"]),
            share(row["kv_bytes_saved"]),
        ]
        for row in rows
    ]
    return table(head, lines or [["all", "", "", *[missing("ablation")] * 5]])


def emissions(results: Results) -> str:
    """F.2 and Figure 16: energy and emissions of a generated token."""
    head = ["", "where", "grams of CO2 for each new token", "saved", "range of turns"]
    base = paper.EMISSIONS_F2["dense"]
    lines = [
        [name, "paper, A100", f"{grams:.2f}", f"{1 - grams / base:.1%}", ""]
        for name, grams in paper.EMISSIONS_F2.items()
    ]
    for name, row in (dig(results.get("carbon"), "rows") or {}).items():
        low, high = row.get("joules_over_dense_range", (1.0, 1.0))
        cells = [name, "ours", f"{row['grams_co2_per_new_token']:.2g}"]
        cells.append(share(1 - row.get("joules_over_dense", 1.0)))
        lines.append([*cells, "" if name == "dense" else f"{1 - high:.1%} to {1 - low:.1%}"])
    if not dig(results.get("carbon"), "rows"):
        lines.append(["ours", "", *[missing("carbon")] * 3])
    return table(head, lines)
