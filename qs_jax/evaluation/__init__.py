"""Quality: perplexity and classification tasks, with what the mechanisms saved."""

from qs_jax.evaluation.datasets import Text, read_text
from qs_jax.evaluation.perplexity import Windows, cut_windows, evaluate, read_windows

__all__ = ["Text", "Windows", "cut_windows", "evaluate", "read_text", "read_windows"]
