"""Tables of docs/linguistics.md from the result file of `benchmarks.linguistics`.

The paper's figures beside ours: Tables 2 and 12 (the same numbers), 9 and 13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from qs_jax.evaluation.linguistics.align import ORDER
from qs_jax.evaluation.linguistics.tags import CATEGORIES, CONTENT, FUNCTION

PAPER_HALTED = dict(
    zip(
        CATEGORIES,
        ((91.4, 1204), (87.2, 986), (89.6, 412), (74.8, 705), (68.3, 893), (18.5, 9710)),
        strict=True,
    )
)
PAPER_FUSED = {12: (78.9, 48.2), 15: (81.2, 47.3), 20: (84.5, 49.8)}
_WORDS = ("paper", "auxiliary", "side", "piece")
# Keys of the rows that tables name.
PAPER_ROW = "paper | paper | teacher-forced"
PERCENTILES_ROW = "percentiles | percentiles, H+K | teacher-forced"
FUSION_ROW = "percentiles | percentiles, F | teacher-forced"
BALANCED_ROW = "presets | balanced | continuation"
AGGRESSIVE_ROW = "presets | aggressive | continuation"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but the first column to the right."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join(
        ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(x) + " |" for x in lines)]
    )


def render(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and Markdown of each table."""
    part = content["corpora"]["treebank"]
    measured = part["rows"]
    yield "halting", _halting(measured, _WORDS)
    yield "universal", _halting(measured, ("universal",))
    yield "depth", _depth(measured)
    yield "fusion", _fusion(part)
    yield "fused labels", _labels(part)
    yield "predictions", _predictions(measured)
    yield "predictions by depth", _by_depth(measured[PERCENTILES_ROW])
    yield "about", _about(content)
    if "spacy" in content["corpora"]:
        spacy = content["corpora"]["spacy"]["rows"]
        yield "spacy", _halting(spacy, _WORDS)


def _share(entry: dict[str, Any], with_interval: bool = True) -> str:
    if entry["share"] is None:
        return "-"
    low, high = entry["interval"]
    ends = f" ({100 * low:.1f} to {100 * high:.1f})" if with_interval else ""
    return f"{entry['share']:.1%}{ends}"


def _halting(rows: dict[str, Any], schemes: Sequence[str]) -> str:
    """The paper's figure, the share halted by the middle layer and at all, and mean depths."""
    middle = rows[PERCENTILES_ROW]["middle_layer"]
    head = [
        "class",
        "paper",
        "tokens",
        "`paper`",
        f"percentiles, by layer {middle}",
        "percentiles",
        "tokens of prompts",
        "`balanced`: mean depth",
        "`aggressive`: mean depth",
    ]
    lines = []
    for scheme in schemes:
        for name in ORDER[scheme]:
            mine = rows[PERCENTILES_ROW]["halting"][scheme][name]
            if not mine["halted"]["count"]:
                continue
            ours = [rows[key]["halting"][scheme][name] for key in (BALANCED_ROW, AGGRESSIVE_ROW)]
            paper = f"{PAPER_HALTED[name][0]}%" if name in PAPER_HALTED else ""
            cells = [name, paper, f"{mine['halted']['count']:,}"]
            cells.append(_share(rows[PAPER_ROW]["halting"][scheme][name]["halted"], False))
            cells += [_share(mine["halted_by_middle"]), _share(mine["halted"])]
            cells += [f"{ours[0]['halted']['count']:,}"]
            cells += ["-" if x["mean_depth"] is None else f"{x['mean_depth']:.1f}" for x in ours]
            lines.append(cells)
    return table(head, lines)


def _depth(rows: dict[str, Any]) -> str:
    """How many tokens stopped after each layer, function against content words."""
    lines = []
    for key, row in rows.items():
        _, name, protocol = key.split(" | ")
        for side in (FUNCTION, CONTENT):
            entry = row["halting"]["side"][side]
            count = entry["halted"]["count"]
            depths = sorted(entry["depths"].items(), key=lambda item: int(item[0]))
            spread = ", ".join(f"{depth}: {n / count:.1%}" for depth, n in depths)
            cells = [name, protocol, side, f"{entry['mean_depth']:.2f}"]
            cells += [f"{entry['mean_kv_layers']:.2f}", f"{entry['mean_bits']:.1f}", spread]
            lines.append(cells)
    head = [
        "",
        "protocol",
        "words",
        "mean depth",
        "layers with KV",
        "bits",
        "layer: share of tokens",
    ]
    return table(head, lines)


def _fusion(part: dict[str, Any]) -> str:
    """Precision of fused pairs against all adjacent pairs, by layer."""
    sources = {
        "criterion alone, dense states": part["criterion"],
        "percentiles, F, teacher-forced": part["rows"][FUSION_ROW]["fusion"],
        "`aggressive`, continuation": part["rows"][AGGRESSIVE_ROW]["fusion"],
    }
    base = part["rows"][FUSION_ROW]["fusion"]["baseline"]
    head = ["pairs", "layer", "paper: fused", "paper: random", "pairs fused", "in one word"]
    head += ["any phrase", "base phrase", "across words: any phrase", "across words: base phrase"]
    lines = [_pairs(["all adjacent (our baseline)", "", "", ""], base)]
    for source, by_layer in sources.items():
        for layer, entry in by_layer.items():
            if layer == "baseline" or not entry["pairs"]:
                continue
            number = int(layer.split()[1])
            fused, random = PAPER_FUSED.get(number, ("", ""))
            paper = [f"{value}%" if value else "" for value in (fused, random)]
            lines.append(_pairs([source, str(number), *paper], entry))
    return table(head, lines)


def _pairs(named: list[str], entry: dict[str, Any]) -> list[str]:
    cells = [*named, f"{entry['pairs']:,}", f"{entry['inside_word']:,}"]
    for kind in ("all", "across"):
        cells += [_share(entry[kind]["phrase"]), _share(entry[kind]["base"])]
    return cells


def _labels(part: dict[str, Any]) -> str:
    """Pairs across words held by an NP, a VP or a PP."""
    lines = []
    base = part["rows"][FUSION_ROW]["fusion"]["baseline"]
    for name, entry in {"all adjacent (our baseline)": base, **part["criterion"]}.items():
        label = name if name.startswith("all") else f"criterion alone, {name}"
        shares = [entry["across"][phrase] for phrase in ("NP", "VP", "PP")]
        lines.append([label, f"{shares[0]['count']:,}", *map(_share, shares)])
    return table(["pairs across words", "number", "in an NP", "in a VP", "in a PP"], lines)


def _change(entry: dict[str, Any], name: str, unit: float, digits: int) -> str:
    value, ends = entry[f"{name}_change"], entry[f"{name}_interval"]
    if value is None:
        return "-"
    shown = f"{unit * value:+.{digits}f}"
    if ends is None:
        return shown
    return f"{shown} ({unit * ends[0]:+.{digits}f} to {unit * ends[1]:+.{digits}f})"


def _changes(entry: dict[str, Any]) -> list[str]:
    dense = "-" if entry["dense_accuracy"] is None else f"{entry['dense_accuracy']:.1%}"
    cells = [f"{entry['tokens']:,}", dense, _change(entry, "accuracy", 100, 1)]
    return [*cells, _change(entry, "nll", 1, 2)]


_CHANGED = ["tokens", "dense accuracy", "change, points", "change of NLL, nats"]


def _predictions(rows: dict[str, Any]) -> str:
    """What became of next-token prediction, by the kind of the predicted word."""
    lines = []
    for key, row in rows.items():
        _, name, protocol = key.split(" | ")
        for side in (FUNCTION, CONTENT):
            entry = row["prediction"]["predicted"]["side"][side]
            lines.append([name, protocol, side, *_changes(entry)])
    return table(["", "protocol", "predicted word", *_CHANGED], lines)


def _by_depth(row: dict[str, Any]) -> str:
    """Figs. 3 and 18: by the word whose state was read, and the layer it stopped after."""
    lines = []
    for side in (FUNCTION, CONTENT):
        by_depth = row["prediction"]["read"]["side"][side]["depth"]
        for depth, entry in sorted(by_depth.items(), key=lambda item: int(item[0])):
            lines.append([side, str(depth), *_changes(entry)])
    return table(["word that was read", "halted after layer", *_CHANGED], lines)


def _about(content: dict[str, Any]) -> str:
    about, made_with = content["about"], content["environment"]
    corpus = content["corpora"]["treebank"]["about"]
    touched = corpus["tokens_by_words_touched"]
    one, none = (touched.get(key, 0) / corpus["tokens"] for key in ("1", "0"))
    packages = made_with["packages"]
    return (
        f"{about['model']}, Penn Treebank sample ({corpus['corpus']}, first {about['windows']} "
        f"windows of {about['seq_len']} tokens, {corpus['words']:,} words; percentiles from the "
        f"{about['fit_windows']} windows after them), {about['dtype']}, masked engine, batch "
        f"{about['batch_size']}, Python {made_with['python']}, jax {packages['jax']}, "
        f"{made_with['processor']}, {made_with['cores']} cores, commit {made_with['commit']}. "
        f"{one:.1%} of the tokens touch one word, {none:.1%} none (spaces and line ends), the "
        "others two or more." + _second(content)
    )


def _second(content: dict[str, Any]) -> str:
    if "spacy" not in content["corpora"]:
        return ""
    corpus = content["corpora"]["spacy"]["about"]
    return f" And {corpus['corpus']}, {corpus['words']:,} words, tagged by {corpus['tagger']}."
