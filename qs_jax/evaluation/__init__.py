"""Measuring quality: perplexity on public or local texts, with what the mechanisms saved."""

from qs_jax.evaluation.datasets import Text, read_text
from qs_jax.evaluation.perplexity import (
    Evaluation,
    Windows,
    cut_windows,
    evaluate,
    read_windows,
    results,
    score_windows,
)

__all__ = [
    "Evaluation",
    "Text",
    "Windows",
    "cut_windows",
    "evaluate",
    "read_text",
    "read_windows",
    "results",
    "score_windows",
]
