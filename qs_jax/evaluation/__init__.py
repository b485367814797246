"""Measuring quality: perplexity on public or local texts, with what the mechanisms saved."""

from qs_jax.evaluation.datasets import Text, read_text
from qs_jax.evaluation.perplexity import Windows, cut_windows, read_windows, results, score_windows

__all__ = [
    "Text",
    "Windows",
    "cut_windows",
    "read_text",
    "read_windows",
    "results",
    "score_windows",
]
