"""For tests: the laws of a configuration, tiny random models and a toy tokenizer."""

from qs_jax.testing.laws import check_laws
from qs_jax.testing.models import tiny_model, tiny_params, toy_tokenizer

__all__ = ["check_laws", "tiny_model", "tiny_params", "toy_tokenizer"]
