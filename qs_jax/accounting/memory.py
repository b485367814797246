"""Bytes of the KV cache, counted from the recorded masks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from qs_jax.config import AMQConfig, ModelConfig
from qs_jax.halves import exact_dtype
from qs_jax.record import Record


def entry_bytes(model: ModelConfig, amq: AMQConfig | None = None) -> Float[np.ndarray, "17"]:
    """Bytes of one token's keys and values at one layer, by its bits; 16 is the model's dtype.

    Simulated codes are packed, with two float16 numbers (low and range) for each group, or one
    where it is symmetric. An int8 cache spends a byte on a code of any width, and one exact scale
    on a head.
    """
    values = 2 * model.kv_size
    table = np.full(17, values * jnp.dtype(model.dtype).itemsize, float)
    if amq is not None and "kv" in amq.targets:
        scale = jnp.dtype(exact_dtype(model.dtype)).itemsize
        for bits in (2, 4, 8):
            if amq.execution == "fake":
                numbers = 2 if amq.symmetric else 4
                table[bits] = values * bits / 8 + values / amq.group * numbers
            else:
                table[bits] = values + 2 * model.num_kv_heads * scale
    return table


def kv_bytes(
    entries: np.ndarray, record: Record, model: ModelConfig, amq: AMQConfig | None
) -> Float[np.ndarray, "L B T"]:
    """Bytes of the entries chosen by a mask, `record.kv_written` or `record.kv_held`."""
    return entries * entry_bytes(model, amq)[record.bits]


def paper_saved_values(record: Record, model: ModelConfig) -> Int[np.ndarray, "L B T"]:
    """The paper's Delta M (appendix J): 2 * KV heads * head width for each halted token-layer."""
    number = np.arange(1, len(record.active) + 1)[:, None, None]
    halted = (number > record.depth[None]) & record.real[None]
    return halted * (2 * model.kv_size)
