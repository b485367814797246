"""Each table of the paper beside ours, from the result files.

Figures of the paper are quoted here: Tables 2, 8 and 12 hold the same numbers, as do 3 and 10, and
9 and 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from benchmarks import environment
from benchmarks.mechanisms import increase, paired_change
from benchmarks.tables import markdown, percent

# Table 2: per cent halted by layer 15, by part of speech.
HALTED = {
    "Determiners (DT)": 91.4,
    "Prepositions (IN)": 87.2,
    "Conjunctions (CC)": 89.6,
    "Pronouns (PRP, PRP$)": 74.8,
    "Auxiliary verbs (MD, VBZ, VBP)": 68.3,
    "Content words (NN, VB, JJ, RB)": 18.5,
}
# Table 3: strategy, perplexity over that of 16 bits, per cent of FLOPs saved; then the names of our
# rows, in ablation.json and in mechanisms.json.
BITS = (
    ("uniform 8-bit", "+0.1", "26.4%", "8 bits", "8 bits"),
    ("2/4/8 (1.0, 2.3)", "+0.1", "39.6%", "2/4/8 bits (1.0, 2.3)", "adaptive, nats (1.0, 2.3)"),
    ("4/8, no 2-bit", "+0.2", "33.2%", "4/8 bits (2.3)", "adaptive, no 2 bits"),
    ("2/4 (1.2, 2.6)", "+1.0", "44.8%", "2/4 bits (1.2)", ""),
)
# Table 4: dense, QuickSilver.
TASKS = {
    "mnli": ("MNLI (matched)", 84.5, 83.9),
    "qnli": ("QNLI", 91.2, 90.7),
    "sst2": ("SST-2", 94.8, 94.6),
    "cola": ("CoLA (Matthews)", 60.1, 59.1),
    "boolq": ("BoolQ", 78.4, 77.6),
    "rte": ("RTE", 74.0, 73.1),
}
# Table 5: tokens it comments on, the layer they halt at, and their bits.
WORDS = (
    *(("This", "", ""), ("is", "20", ""), ("a", "10", ""), ("designed", "", ""), ("to", "20", "")),
    *(("demonstrate", "", "8"), ("dynamic", "", "8"), ("and", "10", "2"), ("by", "10", "")),
    *(("reducing", "", "4"), ("computations", "", "")),
)
# Table 7: milliseconds of the dense model and of QuickSilver, and our scopes.
COMPONENTS = (
    ("token embedding", "2.3", "2.3", ("embed",)),
    ("self-attention", "48.7", "29.1", ("attn",)),
    ("feedforward network", "52.1", "32.8", ("mlp",)),
    ("KV cache write", "17.9", "6.5", ("kv_write",)),
    ("quantization overhead", "", "1.2", ("amq",)),
    ("fusion branching logic", "", "1.0", ("fuse",)),
    ("signals, halting, head, rest", "", "", ("signals", "halt", "head", "light", "other", "idle")),
)
# Table 9: per cent of fused and of random pairs inside a constituent, by layer.
FUSED = {12: ("78.9%", "48.2%"), 15: ("81.2%", "47.3%"), 20: ("84.5%", "49.8%")}
# Table 11: letters, kind, time and FLOPs saved, perplexity increase.
ABLATION = (
    ("H", "isolated", "18%", "22%", "+0.12"),
    ("K", "isolated", "11%", "15%", "+0.06"),
    ("F", "isolated", "23%", "30%", "+0.18"),
    ("Q", "isolated", "15%", "19%", "+0.10"),
    ("H", "cumulative", "18%", "22%", "+0.12"),
    ("H+K", "cumulative", "27%", "34%", "+0.16"),
    ("H+K+F", "cumulative", "41%", "51%", "+0.21"),
    ("H+K+F+Q", "cumulative", "49%", "60%", "+0.22"),
)
# Rows of linguistics.json: the paper's thresholds, its percentile rules, ours.
HALTING_ROWS = (
    "paper | paper | teacher-forced",
    "percentiles | percentiles, H+K | teacher-forced",
    "presets | balanced | continuation",
)
FUSION_ROW = "percentiles | percentiles, F | teacher-forced"

Results = dict[str, Any]
Lines = Iterator[tuple[Any, ...]]


def _halting(results: Results) -> Lines:
    late = "its percentiles, by the middle layer", "its percentiles, at all"
    yield "class", "paper", "our tokens", "paper's thresholds", *late, "`balanced`: mean depth"
    rows = results["linguistics"]["corpora"]["treebank"]["rows"]
    for name, quoted in HALTED.items():
        paper, ours, balanced = (rows[key]["halting"]["paper"][name] for key in HALTING_ROWS)
        cells = f"{quoted}%", f"{ours['halted']['count']:,}", percent(paper["halted"]["share"])
        shares = _interval(ours["halted_by_middle"]), _interval(ours["halted"])
        yield (name, *cells, *shares, f"{balanced['mean_depth']:.1f}")


def _interval(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{entry['share']:.1%} ({low:.1%} to {high:.1%})"


def _bits(results: Results) -> Lines:
    ours = "ours: increase, continuation", "ours: increase, teacher-forced, rotated"
    saved = "ours: paper's FLOPs saved", "ours: exact FLOPs saved"
    yield "strategy", "paper: increase", "paper: FLOPs saved", *ours, *saved
    rows = results["mechanisms"]["rows"]
    for *quoted, name, other in BITS:
        ours = _find(results, kind="sweep", sweep="bits", name=name)
        teacher = rows.get(f"bits | {other} | teacher-forced")
        dense = rows["presets | off | teacher-forced"]
        forced = "" if teacher is None else increase(paired_change(teacher, dense))
        saved = (ours["paper_flops_saved_16bit"], ours["exact_flops_saved"])
        yield (*quoted, increase(ours), forced, *map(percent, saved))


def _find(results: Results, **fields: str) -> dict[str, Any]:
    """The first row of the ablation with these fields."""
    rows = results["ablation"]["rows"]
    return next(row for row in rows if all(row[name] == value for name, value in fields.items()))


def _tasks(results: Results) -> Lines:
    ours = "ours, zero-shot: dense", "change", "ours, linear head: dense", "change of it"
    yield "task", "paper: dense", "paper: change", *ours
    for name, (label, dense, other) in TASKS.items():
        cells = []
        for ours, change, (low, high) in task_results(results["tasks"], name):
            cells.append(f"{100 * ours:.1f}")
            cells.append(f"{100 * change:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        yield label, dense, f"{other - dense:+.1f}", *cells


def task_results(content: dict[str, Any], task: str) -> Iterator[tuple[float, float, list[float]]]:
    """Dense score, change and its interval of a task, zero-shot and then with a fitted head.

    All that this module knows of tasks.json.
    """
    for way in ("zero-shot", "linear head"):
        found = content[way]["tasks"][task]
        change = found["difference"]
        yield found["dense"]["value"], change["value"], change["interval"]


def _walkthrough(results: Results) -> Lines:
    """The tokens that the paper comments on, where they come first."""
    ours = "layers run", "layers with its keys", "fused into", "bits"
    yield "token", "paper: halted at", "paper: bits", *ours
    tokens = results["ablation"]["walkthrough"]["tokens"]
    texts = [token["text"].strip() for token in tokens]
    for word, halted, quoted in WORDS:
        token = tokens[texts.index(word)]
        into = "" if token["fused_into"] is None else f"`{texts[token['fused_into']]}`"
        yield f"`{word}`", halted, quoted, token["depth"], token["kv_layers"], into, token["bits"]


def _components(results: Results) -> Lines:
    ours = "ours: dense", "ours: `balanced`"
    yield "ms", "paper: dense", "paper: QuickSilver", *ours
    parts = results["latency"]["components"]
    shown = [parts[f"{name} prefill"] for name in ("dense", "balanced,")]
    for *quoted, scopes in COMPONENTS:
        times = (1e3 * sum(part.get(scope, 0.0) for scope in scopes) for part in shown)
        yield (*quoted, *(f"{time:,.1f}" for time in times))


def _fusion(results: Results) -> Lines:
    ours = "in one phrase: fused", "all neighbours", "across words: fused", "all across words"
    yield "layer", "paper: fused", "paper: random", *ours
    part = results["linguistics"]["corpora"]["treebank"]
    chance = part["rows"][FUSION_ROW]["fusion"]["baseline"]
    for layer, quoted in FUSED.items():
        cells = []
        for kind in ("all", "across"):
            cells.append(_interval(part["criterion"][f"layer {layer}"][kind]["phrase"]))
            cells.append(percent(chance[kind]["phrase"]["share"]))
        yield layer, *quoted, *cells


def _ablation(results: Results) -> Lines:
    ours = "exact FLOPs, by percentile", "increase", "exact FLOPs, all four", "its increase"
    yield "mechanisms", "paper: time", "paper: FLOPs", "paper: increase", *ours, "its time"
    for letters, kind, *quoted in ABLATION:
        cells = []
        for settings in ("percentile", "all four"):
            row = _find(results, kind=kind, name=letters, settings=settings)
            cells += [percent(row["exact_flops_saved"]), increase(row)]
        left_out = set(row["mechanisms"]) - set(row["timed_mechanisms"])
        time = percent(row["time_saved"]) + ("*" if left_out else "")
        yield f"{letters}, {kind}", *quoted, *cells, time


TABLES: dict[str, Callable[[Results], Lines]] = {
    "tables 2, 8, 12": _halting,
    "tables 3, 10": _bits,
    "table 4": _tasks,
    "table 5": _walkthrough,
    "table 7": _components,
    "tables 9, 13": _fusion,
    "table 11": _ablation,
}


def render() -> dict[str, str]:
    """Markdown of each table, from the result files."""
    files = ("ablation", "latency", "linguistics", "mechanisms", "tasks")
    results = {name: environment.result(name) for name in files}
    tables = {}
    for name, make in TABLES.items():
        head, *lines = make(results)
        tables[name] = markdown(pd.DataFrame(lines, columns=head).astype(str))
    return tables
