"""What a call begins with: embedded tokens, and the carry before the first layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qs_jax.config import ModelConfig
from qs_jax.engine import past as pasts
from qs_jax.engine.call import Call
from qs_jax.halves import exact_dtype
from qs_jax.mechanisms import amq, decide
from qs_jax.mechanisms.plan import NEVER, Numbers, Plan
from qs_jax.models import Params, family_of
from qs_jax.state import Past, TokenState


def open_call(
    params: Params,
    rows: decide.Rows,
    model: ModelConfig,
    plan: Plan,
    numbers: Numbers,
    past: Past | None,
    keeps: bool,
    prompt_lengths_B: Array | None = None,
) -> Call:
    """Embed the tokens and gather what all layers share."""
    with jax.named_scope("embed"):
        embedded: Any = (
            family_of(model)
            .embed(model)
            .apply({"params": params["embed"]}, rows.tokens_BT, rows.pos_BT)
        )
    call = Call(params, model, plan, numbers, rows, embedded, past, keeps, None)
    if call.fuses:
        call = call._replace(context_BXD=pasts.contexts(embedded, rows, plan, past))
    return call._replace(prompt_lengths_B=prompt_lengths_B)


def start(call: Call) -> TokenState:
    """The carry before the first layer."""
    plan, model, past = call.plan, call.model, call.past
    shape, exact = call.rows.pos_BT.shape, exact_dtype(model.dtype)
    never_BT = jnp.full(shape, NEVER, jnp.int32)
    similarity = received = shortlist = taken = code = None
    if call.fuses:
        assert plan.fusion is not None
        taken = jnp.zeros((shape[0], plan.fusion.window), bool)
        if plan.fusion.window > 1:
            similarity = jnp.zeros((*shape, plan.fusion.window), exact)
    if plan.policy == "attended":
        received = jnp.zeros((*shape, shape[1]), exact)
        if past is not None:
            assert past.received_BS is not None
            received = past.received_BS[:, None, :]
    if plan.shortlist_size:
        shortlist = jnp.zeros((*shape, plan.shortlist_size), jnp.int32)
    if plan.policy == "extrapolate":
        size = call.params["kv_maps"].code_size
        code = jnp.zeros((*shape, size), model.dtype)
    return TokenState(
        h_BTD=call.embedded_BTD,
        halt_layer_BT=jnp.full(shape, model.num_layers, jnp.int32),
        hidden_from_BT=never_BT,
        hidden_after_BT=never_BT,
        size_BT=jnp.ones(shape, exact),
        bits_BT=jnp.full(shape, amq.FULL_BITS, jnp.int32),
        similarity_BTW=similarity,
        received_BTS=received,
        shortlist_BTX=shortlist,
        taken_BW=taken,
        code_BTR=code,
    )
