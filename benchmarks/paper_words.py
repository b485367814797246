"""What differs between each table of the paper and ours, in plain words, from the same files."""

from __future__ import annotations

from typing import Any

from benchmarks.linguistics_tables import (
    BALANCED_ROW,
    FUSION_ROW,
    PAPER_HALTED,
    PAPER_ROW,
    PERCENTILES_ROW,
)
from benchmarks.paper_cells import Results, dig, find, increase, missing, share


def halting(results: Results) -> str:
    """Tables 2, 8 and 12."""
    rows = dig(results.get("linguistics"), "corpora", "treebank", "rows")
    *function, content = PAPER_HALTED

    def figures(key: str, *which: str) -> dict[str, float | None]:
        classes = dig(rows, key, "halting", "paper")
        return {name: dig(classes, name, *which) for name in PAPER_HALTED}

    own = figures(PAPER_ROW, "halted", "share")
    mine: dict[str, Any] = figures(PERCENTILES_ROW, "halted_by_middle", "share")
    ours: dict[str, Any] = figures(BALANCED_ROW, "mean_depth")
    if None in (*own.values(), *mine.values(), *ours.values()):
        return f"How far classes differ here is {missing('linguistics')}."

    oftener = sum(mine[name] > mine[content] for name in function)
    earlier = sum(ours[name] < ours[content] for name in function)
    most = max(value for value in own.values() if value is not None)
    determiners = function[0]
    return (
        f"At the paper's own thresholds {share(most)} of a class halt at most. By its percentile "
        f"rules {oftener} of the {len(function)} classes of function words halt more often by "
        f"the middle layer than content words do ({share(mine[determiners])} of determiners, "
        f"{share(mine[content])} of content words); in the paper all of them, 91.4% against 18.5%. "
        f"Under `balanced`, which stops the least attended tokens of a prompt first, {earlier} "
        f"stop earlier: determiners after layer {ours[determiners]:.1f} in the mean, content words "
        f"after {ours[content]:.1f}."
    )


def fusion(results: Results) -> str:
    """Tables 9 and 13."""
    part = dig(results.get("linguistics"), "corpora", "treebank")
    run = dig(part, "rows", FUSION_ROW, "fusion")
    base = dig(run, "baseline", "all", "phrase", "share")
    ours = dig(part, "criterion", "layer 15", "all", "phrase", "share")
    text = (
        "Gold trees of the Penn Treebank here, parses of WikiText by a parser there; *fused* is "
        "the paper's criterion on the dense model's states, closer than the 15th percentile of the "
        "layer. A subword tokenizer puts many such pairs inside one word, which is always inside a "
        "phrase: the last columns leave those out. The paper does not say which constituents "
        "count, so two readings are shown. "
    )
    if base is None or ours is None:
        return f"{text}The difference from chance is {missing('linguistics')}."
    return (
        f"{text}At layer 15 the share of pairs in one phrase is {share(ours)} for fused pairs and "
        f"{share(base)} for all neighbours, a lead of {100 * (ours - base):+.1f} points; the "
        "paper's is +33.9."
    )


def bits(results: Results) -> str:
    """Tables 3 and 10."""
    row = find(results, kind="sweep", sweep="bits", name="2/4/8 bits (1.0, 2.3)")
    text = (
        "The paper's FLOPs are its account relative to 16 bits, which counts an operation at 2 "
        "bits as an eighth of one; bits hold in the layers after the middle only. The exact count "
        "leaves nothing out for them, and pays for reading the entropy of every token. "
        "All bits here are simulated. The paper gives two cutoffs for 2 and 4 bits alone; one "
        "suffices, and the lower is used. "
    )
    if row is None:
        return f"{text}What its thresholds cost here is {missing('ablation')}."
    return (
        f"{text}At its thresholds (1.0, 2.3) the paper pays +0.1 perplexity for 39.6%; here it is "
        f"{increase(row)} for {share(row['paper_flops_saved_16bit'])} in that account and "
        f"{share(row['exact_flops_saved'])} exactly."
    )


def tasks(results: Results) -> str:
    """Table 4."""
    del results
    return (
        "The paper's dense scores are those of models fine-tuned for each task, which it does not "
        "name; ours are of a general model of 135M parameters on about half of each development "
        "file. Compare changes, not levels. Scores are 100 times accuracy or Matthews correlation, "
        "with 95 % intervals; those of a change are paired by example."
    )


def walkthrough(results: Results) -> str:
    """Table 5."""
    tokens = dig(results.get("ablation"), "walkthrough", "tokens")
    layers = dig(results.get("ablation"), "walkthrough", "layers")
    text = (
        "The paper's illustration has a token merge with one that is not its neighbour (`This` and "
        "`a`) and skips keys by a difference that its text defines nowhere; here only neighbours "
        "fuse and keys follow halting. Settings are its percentile rules on this model, "
        "teacher-forced; the paper's halting layers are of 30. "
    )
    if tokens is None:
        return f"{text}The sentence is {missing('ablation')}."
    halted = sum(token["depth"] < layers and token["fused_into"] is None for token in tokens)
    fused = sum(token["fused_into"] is not None for token in tokens)
    return (
        f"{text}Of {len(tokens)} tokens {halted} halt and {fused} are fused into a later one: they "
        "keep their own layers for their own prediction, and later tokens do not see them."
    )


def components(results: Results) -> str:
    """Table 7."""
    parts: Any = dig(results.get("latency"), "components") or {}
    dense, other = parts.get("dense prefill"), parts.get("aggressive, prefill")
    dtype = dig(results.get("latency"), "about", "dtype") or missing("latency")
    text = (
        f"GPT-2 774M in float16 on an A100 there, SmolLM2-135M in {dtype} on shared CPU cores "
        "here; attributed by the profiler, whose total includes what it could not name. "
    )
    if parts and not any("amq" in part for part in parts.values()):
        text += "Bits run only where int8 products are faster; nothing was spent on them here. "
    if dense is None or other is None:
        return f"{text}Totals are {missing('latency')}."
    saved = 1 - sum(other.values()) / sum(dense.values())
    return f"{text}`aggressive` takes {share(saved)} less than the dense prefill; the paper 39.7%."


def ablation(results: Results) -> str:
    """Table 11."""
    rows = [find(results, kind="isolated", settings="paper", name=letter) for letter in "HKF"]
    text = (
        "The paper's FLOPs add no cost of deciding; *exact* does, and can be negative where the "
        "logit lens costs more than halting saves. K alone lets flagged tokens keep computing, so "
        "it saves attention to their keys and no more. Counted savings are simulated; shares are "
        "of what mechanisms may act on, the prompt under continuation, and perplexity is of the "
        "tokens after it. "
    )
    timing = dig(results.get("ablation"), "timing")
    if timing is not None:
        text += (
            f"Time is that of the prefill of {timing['batch']} x {timing['length']} tokens, "
            "measured in turn with the dense model; *without Q* says that bits were left out, "
            "because int8 products are not faster on that machine. "
        )
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        return f"{text}What its own thresholds do here is {missing('ablation')}."
    least = max(row["layer_tokens_saved"] for row in known)
    held = max(row["kv_bytes_saved"] for row in known)
    verdict = "nothing halts and nothing fuses" if max(least, held) == 0 else "little happens"
    return (
        f"{text}At the paper's thresholds {verdict} on this model: H, K and F alone save "
        f"{share(least)} of the layers and {share(held)} of the keys at most."
    )


def synergy(results: Results) -> str:
    """P.4."""
    del results
    return (
        "The paper calls its stack super-additive, but by its own definition (P.1) its figures are "
        "18 to 26 points *below* the sum of the parts, and those of P.4 are not those of Table 11. "
        "What one mechanism has stopped, another cannot save again. Our exact count can do better "
        "together than alone, as mechanisms that share a signal pay for it once. Where K alone is "
        "not defined (keys computed for every token) it is not in the sum."
    )


def texts(results: Results) -> str:
    """C4."""
    del results
    return (
        "The paper names C4 as a data set and has no table of it. The sample here is not C4's "
        "validation set: compare the increases, not the perplexities. Percentiles come from the "
        "first text."
    )


def emissions(results: Results) -> str:
    """F.2."""
    method = dig(results.get("carbon"), "about", "method")
    text = (
        "The paper measured an A100 80GB, of which there is none here; no saving of ours can be "
        "set against its grams. Ours are of a whole call with its prompt on this machine."
    )
    if not isinstance(method, dict):
        return text
    how = "; ".join(f"{part.upper()} {said}" for part, said in method.items())
    return f"{text} How: {how}."
