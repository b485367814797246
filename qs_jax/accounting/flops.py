"""Floating-point operations, counted from the recorded masks.

Two accounts. `exact`: every matrix product the decisions leave to be done, attention over the keys
each query really sees, and every signal, rotation, map and test the mechanisms add; a multiply-add
is two. Elementwise work of the plain model (norms, RoPE, softmax, activations) is left out on both
sides. `paper`: the formula of the paper's appendix J, which does not fit Llama (two MLP products of
width 4D, attention logarithmic in length) and charges nothing for signals.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from qs_jax.config import AMQConfig, FusionConfig, ModelConfig, QuickSilverConfig
from qs_jax.mechanisms import custom
from qs_jax.mechanisms.halting import reads_of
from qs_jax.mechanisms.int8 import LARGEST_ROTATION
from qs_jax.mechanisms.kv_maps import MapSizes
from qs_jax.mechanisms.light import LightSizes
from qs_jax.models import family_of
from qs_jax.record import Record

# Cost of a bit width relative to 8 bits (appendix J) and to 16 bits (Tables 3 and 10).
BETA = {
    "8bit": {16: 1.0, 8: 1.0, 4: 0.5, 2: 0.25},
    "16bit": {16: 1.0, 8: 0.5, 4: 0.25, 2: 0.125},
}


def linear_flops(model: ModelConfig) -> int:
    """The four projections of one layer for one token: 2 D (Q + 2 KV) + 2 Q D + MLP."""
    d, q, kv = model.hidden_size, model.q_size, model.kv_size
    mlp = 2 * d * model.mlp_size * family_of(model).mlp_products
    return 2 * d * (q + 2 * kv) + 2 * q * d + mlp


def key_flops(model: ModelConfig) -> int:
    """Attention of one query to one key, all heads: scores and weighted sum."""
    return 4 * model.q_size


def head_flops(model: ModelConfig) -> int:
    """Logits of one position."""
    return 2 * model.hidden_size * model.vocab_size


def entropy_flops(kind: str | None, model: ModelConfig, shortlist_size: int) -> int:
    """One evaluation of an entropy estimator; "final_prev" is charged as a readout."""
    channels = 6 * model.hidden_size
    costs = {"vocab": head_flops(model) + 4 * model.vocab_size, "latent": channels}
    costs |= {"shortlist": (2 * model.hidden_size + 4) * shortlist_size, "variance": channels}
    return costs.get(kind or "", 0)


def keys_values_flops(model: ModelConfig, rows: int | None = None) -> int:
    """Keys and values of one token in one layer, from its state or from so many numbers."""
    return 2 * (model.hidden_size if rows is None else rows) * 2 * model.kv_size


def mlp_flops(model: ModelConfig) -> int:
    """The MLP of one layer for one token."""
    return 2 * model.hidden_size * model.mlp_size * family_of(model).mlp_products


def model_flops(
    record: Record, model: ModelConfig, light: Mapping[int, LightSizes] | None = None
) -> dict[str, Int[np.ndarray, "L B T"]]:
    """Projections of attention, attention to keys, and MLP of each (layer, token) that ran.

    Of a prompt, the last layer computes keys and values, and the rest for its last token only.

    Args:
      record: Which ran, and the keys they saw.
      model: From `qs_jax.load`.
      light: Sizes of light layers, by number; every token that stops runs them light. Their maps
        count as MLP.
    """
    active, visible = record.active, record.visible_keys.astype(np.int64)
    projections = active * np.int64(linear_flops(model) - mlp_flops(model))
    keys, mlp = visible * key_flops(model), active * np.int64(mlp_flops(model))
    stopping = record.real & (record.depth < len(active))
    for number, sizes in (light or {}).items():
        at = number - 1
        here, (attention, per_key, neurons) = active[at] & stopping, light_flops(model, sizes)
        projections[at] = np.where(here, attention, projections[at])
        keys[at] = np.where(here, visible[at] * per_key, keys[at])
        mlp[at] = np.where(here, neurons, mlp[at])
    pos = np.arange(record.depth.shape[1])[None]
    unread = active[-1] & (pos < record.prompt_lengths[:, None] - 1)
    projections[-1] = np.where(unread, keys_values_flops(model), projections[-1])
    keys[-1], mlp[-1] = np.where(unread, 0, keys[-1]), np.where(unread, 0, mlp[-1])
    return {"attention_projections": projections, "attention_keys": keys, "mlp": mlp}


def light_flops(model: ModelConfig, sizes: LightSizes) -> tuple[int, int, int]:
    """Of one light layer: a token's projections, its attention to a key, its neurons and map."""
    d, heads = model.hidden_size, sizes.heads * model.head_dim
    neurons = 2 * d * sizes.neurons * (family_of(model).mlp_products - 1)
    code = 2 * (d + sizes.neurons + 1) * sizes.code + 2 * sizes.code * d
    return 4 * d * heads + keys_values_flops(model), 4 * heads, neurons + code


def added_flops(
    record: Record, model: ModelConfig, qs: QuickSilverConfig, map_sizes: MapSizes | None
) -> Int[np.ndarray, "L B T"]:
    """Operations that the mechanisms add to each (layer, token).

    `map_sizes` are of the extrapolation maps; None where keys come from the projection.
    """
    number = np.arange(1, len(record.active) + 1)[:, None, None]
    added = stopped_keys_flops(record, model, qs, map_sizes)
    if qs.halting is not None:
        added += _halting_flops(record, model, qs)
    if qs.fusion is not None:
        added += _fusion_flops(record, model, qs.fusion, number)
    if qs.amq is not None:
        added += _amq_flops(record, model, qs.amq, number)
        assigned = (number == qs.amq.layer) & (record.bits[-1:] < 16) & record.subject
        added += assigned * entropy_flops(qs.amq.entropy, model, qs.shortlist_size)
    if "shortlist" in qs.entropies:
        picks = (number == qs.shortlist_layer) & record.active & record.subject
        added += picks * head_flops(model)
    return added


def stopped_keys_flops(
    record: Record, model: ModelConfig, qs: QuickSilverConfig, sizes: MapSizes | None
) -> Int[np.ndarray, "L B T"]:
    """Keys and values of tokens that do not run a layer: by the projection, maps or own policy."""
    number = np.arange(1, len(record.active) + 1)[:, None, None]
    each = keys_values_flops(model, None if sizes is None else sizes.code)
    if qs.kv_skip is not None and qs.kv_skip.is_custom:
        each = policy_flops(qs.kv_skip.policy, model)
    added = (record.kv_written & ~record.active) * each
    if sizes is not None:  # read once, when a token stops: neurons of the next layers, and the code
        once = 2 * model.hidden_size * sizes.neurons * (family_of(model).mlp_products - 1)
        once += 2 * sizes.features * sizes.code if sizes.code < sizes.features else 0
        added += once * ((record.depth == number) & (number < len(number)) & record.real)
    return added


def _halting_flops(record: Record, model: ModelConfig, qs: QuickSilverConfig) -> np.ndarray:
    halting = qs.halting
    assert halting is not None
    here = halting.may_halt(len(record.active))[:, None, None] & record.active & record.subject
    reads = reads_of(halting, model)
    added = here * (4 * model.hidden_size if "drift_BT" in reads else 0)
    if halting.ranks and not isinstance(halting.score, str):
        added += here * score_flops(halting.score, model, record.depth.shape[1])
    read = ~np.isnan(record.entropy)
    added += read * entropy_flops(halting.entropy_used, model, qs.shortlist_size)
    if halting.light_from is not None and halting.leaves_whole:  # one product for each token
        added[halting.light_from - 2] += record.subject * 2 * (model.hidden_size + 1)
    if "received_BT" in reads:
        pos, ends = np.arange(record.depth.shape[1])[None], record.prompt_lengths[:, None]
        queries = (pos >= ends - halting.score_queries) & (pos < ends)
        added += here * queries * record.visible_keys * model.num_heads
    if qs.kv_skip is not None and qs.kv_skip.policy == "attended":
        added += record.visible_keys * model.num_heads
    return added


def _fusion_flops(record: Record, model: ModelConfig, fusion: FusionConfig, number: Any) -> Any:
    d, last = model.hidden_size, fusion.last_layer or len(number) - 1
    ran = record.active & record.subject & (number <= last)
    tests = 1 if fusion.tau_ctx is None else 2
    added = (ran & (number >= fusion.first_layer)) * (tests * fusion.window * 3 * d)
    if fusion.window > 1:
        added += ran * (fusion.window * 2 * model.q_size)
    weight = 3 * d
    if fusion.alpha == "probability":
        weight += head_flops(model) + 4 * model.vocab_size
    return added + record.weighed * weight


def _amq_flops(record: Record, model: ModelConfig, amq: AMQConfig, number: Any) -> np.ndarray:
    """Quantisation of the targets; a number of operations for each channel."""
    real = amq.execution != "fake"
    if real:  # 3 more for the bits to leave out; rotated weights spare the way back
        kv_channel, channel = 9, 9 + 2 * LARGEST_ROTATION
    else:  # quantise and dequantise a channel: 6 operations; a rotation there and back: 2 G each
        kv_channel = channel = 6 + (4 * amq.group if amq.rotate else 0)
    quantised = record.bits < 16
    ran, d, kv = record.active & quantised, model.hidden_size, 2 * model.kv_size
    added = np.zeros(record.active.shape, np.int64)
    if "linear" in amq.targets:
        keys_only = record.kv_written & ~record.active & quantised
        inputs = 2 * d + model.q_size + model.mlp_size
        added += ran * (inputs * channel) + keys_only * (d * channel)
        if real:  # two scales: 2 operations an output channel
            outputs = 2 * d + model.q_size + kv
            outputs += (family_of(model).mlp_products - 1) * model.mlp_size
            added += ran * (2 * outputs) + keys_only * (2 * kv)
    if "hidden" in amq.targets:  # bits hold to the last layer
        deeper = record.active & quantised[-1:] & (number >= amq.layer)
        added += deeper * (d * channel)
    if "kv" in amq.targets:
        added += (record.kv_written & quantised) * (kv * kv_channel)
    return added


@functools.lru_cache(maxsize=256)
def score_flops(score: Any, model: ModelConfig, width: int) -> int:
    """A score of the user's own, for one token of a row of `width`; its signals are charged apart.

    XLA's count of the function on arrays of these shapes, before it optimises, over the tokens; a
    transcendental function counts as one operation.
    """
    return _operations(score, custom.abstract_signals(model, 1, width)) // width


@functools.lru_cache(maxsize=256)
def policy_flops(policy: Any, model: ModelConfig) -> int:
    """Keys and values of one token in one layer by a policy of the user's own; as `score_flops`."""
    function, given = custom.abstract_policy(policy, model, width=1)
    return _operations(function, *given)


def _operations(function: Any, *given: Any) -> int:
    counted: Any = jax.jit(function).lower(*given).cost_analysis() or {}
    return int(counted.get("flops", 0) + counted.get("transcendentals", 0))


def paper_layer_flops(model: ModelConfig, tokens: int) -> float:
    """The paper's cost of one layer for one token of a row of N (appendix J).

    4 d^2 + 2 h (d + h log N) for attention and 8 d^2 for the MLP, natural logarithm.
    """
    d, h = model.hidden_size, model.num_heads
    return 4 * d * d + 2 * h * (d + h * math.log(max(tokens, 1))) + 8 * d * d


def paper_flops(record: Record, model: ModelConfig, relative_to: str) -> Float[np.ndarray, "L B T"]:
    """The paper's cost of each (layer, token): N_active * FLOPs * beta.

    A token counts while it is neither halted nor absorbed, whatever the protocol makes of it.
    `relative_to` is "8bit" or "16bit", the bit width that costs 1.
    """
    alone = record.fused == np.arange(record.fused.shape[-1])
    table = np.zeros(17)
    table[list(BETA[relative_to])] = list(BETA[relative_to].values())
    per_row = np.array([paper_layer_flops(model, int(length)) for length in record.lengths])
    return (record.active & alone) * table[record.bits] * per_row[None, :, None]
