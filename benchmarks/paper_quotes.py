"""Figures quoted from the tables of the QuickSilver paper; nothing here was measured by us.

Tables 2, 8 and 12 hold the same numbers, as do 3 and 10; those of 2 and of 9 and 13 are in
`benchmarks.linguistics_tables`.
"""

from __future__ import annotations

from typing import NamedTuple


class Bits(NamedTuple):
    """A row of Tables 3 and 10: perplexity and FLOPs saved, GPT-2 774M, WikiText-103."""

    strategy: str
    bits: str
    ppl: float
    flops_saved: float


BITS_3 = (
    Bits("full precision", "16", 18.2, 0.0),
    Bits("uniform 8-bit", "8", 18.3, 26.4),
    Bits("entropy-aware (1.0, 2.3)", "2/4/8", 18.3, 39.6),
    Bits("entropy-aware, no 2-bit", "4/8", 18.4, 33.2),
    Bits("aggressive (1.2, 2.6)", "2/4", 19.2, 44.8),
)

# Table 4: dense, QuickSilver.
TASKS_4 = {
    "mnli": ("MNLI (matched)", 84.5, 83.9),
    "qnli": ("QNLI", 91.2, 90.7),
    "sst2": ("SST-2", 94.8, 94.6),
    "cola": ("CoLA (Matthews)", 60.1, 59.1),
    "boolq": ("BoolQ", 78.4, 77.6),
    "rte": ("RTE", 74.0, 73.1),
}

# Table 5: the sentence, and what it says of some of its tokens.
SENTENCE_5 = (
    "This is a long sentence designed to demonstrate how dynamic token halting enhanced KV cache "
    "optimization and contextual token fusion work together to accelerate inference by reducing "
    "redundant computations and merging similar tokens."
)
HALTED_5 = {"is": 20, "a": 10, "to": 20, "and": 10, "by": 10}
FUSED_5 = ("This + a", "designed + to", "computations + and")
BITS_5 = {"and": 2, "reducing": 4, "demonstrate": 8, "dynamic": 8}

# Table 7: milliseconds of the dense model and of QuickSilver, and per cent saved; 8 x 512 tokens,
# GPT-2 774M, A100.
COMPONENTS_7: dict[str, tuple[float | None, float, float | None]] = {
    "token embedding": (2.3, 2.3, 0.0),
    "self-attention": (48.7, 29.1, 40.2),
    "feedforward network": (52.1, 32.8, 37.0),
    "KV cache write": (17.9, 6.5, 63.6),
    "quantization overhead": (None, 1.2, None),
    "fusion branching logic": (None, 1.0, None),
    "total": (121.0, 72.9, 39.7),
}


class Ablated(NamedTuple):
    """A row of Table 11: per cent of time and FLOPs saved, and the perplexity increase."""

    letters: str
    technique: str
    kind: str
    speedup: float
    flops_saved: float
    ppl_increase: float


ABLATION_11 = (
    Ablated("H", "token halting", "isolated", 18, 22, 0.12),
    Ablated("K", "KV skipping", "isolated", 11, 15, 0.06),
    Ablated("F", "token fusion", "isolated", 23, 30, 0.18),
    Ablated("Q", "quantization", "isolated", 15, 19, 0.10),
    Ablated("H", "token halting", "cumulative", 18, 22, 0.12),
    Ablated("HK", "+ KV skipping", "cumulative", 27, 34, 0.16),
    Ablated("HKF", "+ token fusion", "cumulative", 41, 51, 0.21),
    Ablated("HKFQ", "+ quantization", "cumulative", 49, 60, 0.22),
)
# P.4, in the text: per cent of FLOPs saved by all, and by H, K, F and Q alone.
SYNERGY_P4 = (47.2, (18.1, 9.4, 12.6, 26.4))

# F.2 and Figure 16: grams of CO2 for each generated token on an A100 80GB, mechanisms added up.
EMISSIONS_F2 = {
    "dense": 0.51,
    "+ token halting": 0.37,
    "+ KV skipping": 0.34,
    "+ token fusion": 0.32,
    "+ quantization": 0.30,
    "full stack": 0.29,
}
