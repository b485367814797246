"""Costs and savings of a call, counted from its record.

A tally is a nested dict of numbers and per-layer lists, ready for JSON; tallies of batches add up.
Everything is split into "prefill" (the prompt, or all of a row scored teacher-forced) and "decode"
(the tokens after the prompt). Savings of the masked engine are simulated.
"""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from qs_jax.accounting import flops
from qs_jax.config import AMQConfig, ModelConfig, QuickSilverConfig
from qs_jax.errors import ConfigError
from qs_jax.mechanisms.kv_maps import MapSizes
from qs_jax.record import Record
from qs_jax.state import exact_dtype

_SAVED = {
    "layer_tokens_saved": ("layer_tokens", "layer_tokens_dense"),
    "exact_flops_saved": ("exact_flops", "exact_flops_dense"),
    "paper_flops_saved": ("paper_flops", "paper_flops_dense"),
    "paper_flops_saved_16bit": ("paper_flops_16bit", "paper_flops_dense"),
    "kv_bytes_saved": ("kv_bytes_held", "kv_bytes_dense"),
    "kv_bytes_written_saved": ("kv_bytes_written", "kv_bytes_dense"),
}


def tally(
    record: Record,
    model: ModelConfig,
    quicksilver: QuickSilverConfig | None,
    map_sizes: MapSizes | None = None,
) -> dict[str, Any]:
    """Count one call.

    Args:
      record: Its evidence.
      model: From `qs_jax.load`.
      quicksilver: Mechanisms that ran; None for none.
      map_sizes: Of the extrapolation maps (`KVMaps.sizes`) where the policy is "extrapolate".

    Returns:
      {"prefill": part, "decode": part}; a part has totals, their dense counterparts, the cost of
      the signals in it, and "per_layer" lists of L.
    """
    qs = quicksilver or QuickSilverConfig()
    extrapolates = qs.kv_skip is not None and qs.kv_skip.policy == "extrapolate"
    if extrapolates and map_sizes is None:
        raise ConfigError("give map_sizes, those of the KV maps: they decide the cost of a key.")
    added = flops.added_flops(record, model, qs, map_sizes if extrapolates else None)
    light = None
    if map_sizes is not None and qs.halting is not None and qs.halting.light_from is not None:
        light = dict(enumerate(map_sizes.light, start=qs.halting.light_from))
    parts = flops.model_flops(record, model, light)
    kv_bytes = entry_bytes(model, qs.amq)[record.bits]
    halted = (np.arange(1, len(record.active) + 1)[:, None, None] > record.depth) & record.real
    counts = {
        "layer_tokens": record.active,
        "exact_flops": sum(parts.values()) + added,
        **parts,
        "added_flops": added,
        "paper_flops": flops.paper_flops(record, model, "8bit"),
        "paper_flops_16bit": flops.paper_flops(record, model, "16bit"),
        "kv_bytes_written": record.kv_written * kv_bytes,
        "kv_bytes_held": record.kv_held * kv_bytes,
        "visible_keys": record.visible_keys,
        "kv_written": record.kv_written,
        "halted": halted,
        "fused": (record.fused != np.arange(record.fused.shape[-1])) & record.real,
        "entropy_read": ~np.isnan(record.entropy),
        # The paper's Delta M (appendix J): 2 * KV heads * head width.
        "paper_kv_values_saved": halted * (2 * model.kv_size),
        **{f"bits_{b}": (record.bits == b) & record.real for b in (2, 4, 8, 16)},
    }
    return _split(counts, record, model, every_output_read="final_prev" in qs.entropies)


def dense_tally(lengths: np.ndarray, prompt_lengths: np.ndarray, model: ModelConfig) -> Any:
    """Count rows of the dense model, which keeps no record."""
    return tally(dense_record(lengths, prompt_lengths, model), model, None)


def dense_record(lengths: np.ndarray, prompt_lengths: np.ndarray, model: ModelConfig) -> Record:
    """The record a call without mechanisms would have: everything runs, every key is seen."""
    rows, width, layers = len(lengths), int(max(lengths)), model.num_layers
    pos = np.broadcast_to(np.arange(width), (layers, rows, width))
    real = pos < np.asarray(lengths)[None, :, None]
    nan = np.full(real.shape, np.nan)
    return Record(
        active=real,
        kv_written=real,
        kv_held=real,
        visible_keys=np.where(real, np.minimum(pos + 1, model.sliding_window or width), 0),
        bits=np.full(real.shape, 16),
        fused=pos,
        drift=nan,
        entropy=nan,
        weighed=np.zeros(real.shape, bool),
        depth=np.where(real[0], layers, 0),
        representative=pos[0],
        lengths=np.asarray(lengths),
        prompt_lengths=np.asarray(prompt_lengths),
    )


def _split(
    counts: dict[str, np.ndarray], record: Record, model: ModelConfig, *, every_output_read: bool
) -> dict[str, Any]:
    """Sum the counts over the prompts, and over the tokens after them."""
    pos = np.arange(record.depth.shape[1])[None]
    prompted = record.prompt_lengths > 0
    ends = np.where(prompted, record.prompt_lengths, record.lengths)[:, None]
    layers, head = model.num_layers, flops.head_flops(model)
    # Summed as the record's own costs are: a dense record saves exactly nothing.
    dense = dense_record(record.lengths, record.prompt_lengths, model)
    paper_dense = flops.paper_flops(dense, model, "8bit")
    out: dict[str, Any] = {}
    parts = {"prefill": record.real & (pos < ends), "decode": record.real & (pos >= ends)}
    for name, mask in parts.items():
        tokens = int(mask.sum())
        readouts = tokens
        if name == "prefill":  # a prompt is read out once, at its end; a scored row everywhere
            readouts = int(prompted.sum() + mask[~prompted].sum())
        per_layer = {key: (array * mask).sum((1, 2)).tolist() for key, array in counts.items()}
        part: dict[str, Any] = {key: sum(values) for key, values in per_layer.items()}
        part["exact_flops"] += readouts * head
        if every_output_read:  # and its entropy taken
            extra = (tokens - readouts) * head + tokens * 4 * model.vocab_size
            part["exact_flops"] += extra
            part["added_flops"] += extra
        exact = int((sum(flops.model_flops(dense, model).values()) * mask).sum())
        out[name] = part | {
            "tokens": tokens,
            "readouts": readouts,
            "layer_tokens_dense": tokens * layers,
            "exact_flops_dense": exact + readouts * head,
            "paper_flops_dense": sum((paper_dense * mask).sum((1, 2)).tolist()),
            "kv_bytes_dense": float(tokens * layers * entry_bytes(model)[16]),
            "per_layer": per_layer,
        }
    return out


def add(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The sum of two tallies."""
    return jax.tree.map(operator.add, a, b)


def is_idle(counted: dict[str, Any]) -> bool:
    """Nothing halted, fused, lost bits or lost a key: every token did its whole work."""
    acts = ("halted", "fused", "bits_2", "bits_4", "bits_8")
    parts = counted.values()
    written = all(part["kv_written"] == part["layer_tokens_dense"] for part in parts)
    return written and not any(part[name] for part in parts for name in acts)


def summary(counted: dict[str, Any]) -> dict[str, Any]:
    """Shares saved, between 0 and 1 (negative where a mechanism costs more than it saves).

    Returns:
      The shares over everything, and the same under "prefill" and "decode" (None where empty).
    """
    prefill, decode = counted["prefill"], counted["decode"]
    both = {key: prefill[key] + decode[key] for key in prefill if key != "per_layer"}
    return {**(_shares(both) or {}), "prefill": _shares(prefill), "decode": _shares(decode)}


def _shares(part: dict[str, Any]) -> dict[str, float] | None:
    if not part["tokens"]:
        return None
    shares = {name: 1 - part[now] / part[dense] for name, (now, dense) in _SAVED.items()}
    return shares | {"added_flops_share": part["added_flops"] / part["exact_flops_dense"]}


def entry_bytes(model: ModelConfig, amq: AMQConfig | None = None) -> Float[np.ndarray, "17"]:
    """Bytes of one token's keys and values at one layer, by its bits; 16 is the model's dtype.

    Simulated codes are packed, with one float16 number for each group or two where it is not
    symmetric; an int8 cache spends a byte on a code of any width, and one exact scale on a head.
    """
    values = 2 * model.kv_size
    table = np.full(17, values * jnp.dtype(model.dtype).itemsize, float)
    if amq is not None and "kv" in amq.targets:
        scale = jnp.dtype(exact_dtype(model.dtype)).itemsize
        bits = np.array([2, 4, 8])
        if amq.execution == "fake":
            table[bits] = values * bits / 8 + values / amq.group * (2 if amq.symmetric else 4)
        else:
            table[bits] = values + 2 * model.num_kv_heads * scale
    return table
