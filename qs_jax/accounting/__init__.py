"""What a call cost and what it saved, counted from its record.

A tally is a nested dict of numbers and per-layer lists, ready for JSON; tallies of batches add up.
Everything is split into "prefill" (the prompt, or all of a row scored teacher-forced) and "decode"
(the tokens after the prompt). Savings of the masked engine are simulated.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

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
      model: Sizes.
      quicksilver: Mechanisms that ran; None for none.
      map_sizes: Of the extrapolation maps (`KVMaps.sizes`) where the policy is "extrapolate".

    Returns:
      {"prefill": part, "decode": part}; a part has totals, their dense counterparts, the cost of
      the signals in it, and "per_layer" lists of L.
    """
    qs = quicksilver or QuickSilverConfig()
    if qs.amq is not None and (record.bits == 16).all():
        qs = dataclasses.replace(qs, amq=None)  # execution "auto" left it out
    policy = qs.kv_skip.policy if qs.kv_skip is not None else "propagate"
    if policy == "extrapolate" and map_sizes is None:
        raise ConfigError("give map_sizes, those of the KV maps: they decide what a key costs.")
    added = flops.added_flops(record, model, qs, map_sizes if policy == "extrapolate" else None)
    counts = {
        "layer_tokens": record.active,
        "exact_flops": flops.model_flops(record.active, record.visible_keys, model) + added,
        "added_flops": added,
        "paper_flops": flops.paper_flops(record, model, "8bit"),
        "paper_flops_16bit": flops.paper_flops(record, model, "16bit"),
        "kv_bytes_written": kv_bytes(record.kv_written, record, model, qs.amq),
        "kv_bytes_held": kv_bytes(record.kv_held, record, model, qs.amq),
        "visible_keys": record.visible_keys,
        "kv_written": record.kv_written,
        "halted": (np.arange(1, len(record.active) + 1)[:, None, None] > record.depth)
        & record.real,
        "fused": (record.fused != np.arange(record.fused.shape[-1])) & record.real,
        "entropy_read": ~np.isnan(record.entropy),
        "paper_kv_values_saved": paper_saved_values(record, model),
        **{f"bits_{b}": (record.bits == b) & record.real for b in (2, 4, 8, 16)},
    }
    return _split(
        counts, record.lengths, record.prompt_lengths, model, "final_prev" in qs.entropies
    )


def dense_tally(
    lengths: np.ndarray, prompt_lengths: np.ndarray, model: ModelConfig
) -> dict[str, Any]:
    """Count rows of the dense model, which keeps no record."""
    return tally(dense_record(lengths, prompt_lengths, model), model, None)


def dense_record(lengths: np.ndarray, prompt_lengths: np.ndarray, model: ModelConfig) -> Record:
    """The record a call without mechanisms would have: everything runs, every key is seen."""
    rows, width, layers = len(lengths), int(max(lengths)), model.num_layers
    pos = np.broadcast_to(np.arange(width), (layers, rows, width))
    real = pos < np.asarray(lengths)[None, :, None]
    return Record(
        active=real,
        kv_written=real,
        kv_held=real,
        visible_keys=np.where(real, pos + 1, 0),
        bits=np.full(real.shape, 16),
        fused=pos,
        drift=np.full(real.shape, np.nan),
        entropy=np.full(real.shape, np.nan),
        weighed=np.zeros(real.shape, bool),
        depth=np.where(real[0], layers, 0),
        representative=pos[0],
        lengths=np.asarray(lengths),
        prompt_lengths=np.asarray(prompt_lengths),
    )


def _split(
    counts: dict[str, np.ndarray],
    lengths: np.ndarray,
    prompt_lengths: np.ndarray,
    model: ModelConfig,
    token_by_token: bool,
) -> dict[str, Any]:
    width = counts["layer_tokens"].shape[-1]
    pos = np.arange(width)[None]
    real = pos < lengths[:, None]
    ends = np.where(prompt_lengths > 0, prompt_lengths, lengths)[:, None]
    parts = {"prefill": real & (pos < ends), "decode": real & (pos >= ends)}
    head, layers = flops.head_flops(model), model.num_layers
    # Summed as the record's own costs are: a dense record saves exactly nothing.
    paper_dense = flops.paper_flops(dense_record(lengths, prompt_lengths, model), model, "8bit")
    out: dict[str, Any] = {}
    for name, mask in parts.items():
        tokens = int(mask.sum())
        # A prompt is read out once, at its end; everything else at every position.
        readouts = int((prompt_lengths > 0).sum()) if name == "prefill" else tokens
        if name == "prefill":
            readouts += int((mask * (prompt_lengths == 0)[:, None]).sum())
        per_layer = {key: (array * mask).sum((1, 2)).tolist() for key, array in counts.items()}
        keys = int((mask * (pos + 1)).sum())
        exact = layers * (tokens * flops.linear_flops(model) + keys * flops.key_flops(model))
        part: dict[str, Any] = {key: sum(values) for key, values in per_layer.items()}
        part["exact_flops"] += readouts * head
        if token_by_token:  # every output is read, and its entropy taken
            extra = (tokens - readouts) * head + tokens * 4 * model.vocab_size
            part["exact_flops"] += extra
            part["added_flops"] += extra
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
    out: dict[str, Any] = {}
    for key, value in a.items():
        other = b[key]
        if isinstance(value, dict):
            out[key] = add(value, other)
        elif isinstance(value, list):
            out[key] = [x + y for x, y in zip(value, other, strict=True)]
        else:
            out[key] = value + other
    return out


def summary(counted: dict[str, Any]) -> dict[str, Any]:
    """Shares saved, between 0 and 1 (negative where a mechanism costs more than it saves).

    Returns:
      The shares over everything, and the same under "prefill" and "decode" (None where empty).
    """
    prefill, decode = counted["prefill"], counted["decode"]
    both = {key: prefill[key] + decode[key] for key in prefill if key != "per_layer"}
    out: dict[str, Any] = dict(_shares(both) or {})
    out["prefill"], out["decode"] = _shares(prefill), _shares(decode)
    return out


def _shares(part: dict[str, Any]) -> dict[str, float] | None:
    if not part["tokens"]:
        return None
    shares = {name: 1 - part[now] / part[dense] for name, (now, dense) in _SAVED.items()}
    return shares | {"added_flops_share": part["added_flops"] / part["exact_flops_dense"]}


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
