"""Flax blocks of the supported families, and their parameters as one stacked tree.

The tree of every family has the same top level::

    embed       token (and position) tables
    layers      one block's parameters, each with a leading layer axis [L, ...]
    final_norm
    head        {"tokens": [V, D]}, only where the head is not tied to the embedding
"""

from qs_jax.models.params import (
    Params,
    abstract_params,
    apply_block,
    count_params,
    embed,
    init_params,
    param_bytes,
)
from qs_jax.models.registry import FAMILIES, Family, family_of

__all__ = [
    "FAMILIES",
    "Family",
    "Params",
    "abstract_params",
    "apply_block",
    "count_params",
    "embed",
    "family_of",
    "init_params",
    "param_bytes",
]
