"""States of every layer, dense and under the mechanisms, as functions one can differentiate.

Both run the engines' own layers. A nudge added to the input embeddings is what gradients are taken
of: embeddings are looked up by discrete ids, so they are no argument of the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
from jax import lax
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine import dense, layer, opening, tokenwise
from qs_jax.engine import past as pasts
from qs_jax.engine.call import Call
from qs_jax.mechanisms.plan import Numbers, Plan
from qs_jax.models import Params, family_of
from qs_jax.state import LayerRecord, TokenState


@contextmanager
def nudged(model: ModelConfig, nudge_BTD: Float[Array, "B T D"]) -> Iterator[None]:
    """Add `nudge_BTD` to the input embeddings of every engine traced inside."""
    embed = family_of(model).embed

    def add(function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        out = function(*args, **kwargs)
        is_embed = isinstance(context.module, embed) and context.method_name == "__call__"
        return out + nudge_BTD if is_embed else out

    with nn.intercept_methods(add):
        yield


class Straight(Call):
    """A call that sees what fusion hid, but neither merges nor rounds.

    Merging runs in a loop of unknown length and rounding is a step: JAX has no gradient for the
    first, and the second's is zero. Gradients go through both as if they changed nothing (the
    straight-through estimator, Bengio et al. 2013).
    """

    @property
    def quantizes(self) -> bool:
        return False

    @property
    def fuses(self) -> bool:
        return False


def dense_states(
    params: Params, tokens_BT: Int[Array, "B T"], model: ModelConfig
) -> Float[Array, "L B T D"]:
    """States after each layer of the dense model."""

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return dense.causal_attention(q, k, v), None

    return dense.look_at_layers(params, tokens_BT, model, lambda _, after, __: after, attend)


def masked_states(
    params: Params,
    prompt: tokenwise.Prompt,
    numbers: Numbers,
    model: ModelConfig,
    plan: Plan,
) -> tuple[Float[Array, "L B T D"], TokenState, LayerRecord]:
    """States after each layer of the masked engine; `masked.run` gives their last one, normed.

    Decisions are steps, so they have no gradient; see `Straight` for fusion and few bits.

    Args:
      params: As a program of this plan takes them (`execution.with_weights`).
      prompt: Right-padded rows.
      numbers: Traced half of the mechanisms.
      model: Architecture.
      plan: Static half; not one that reads the previous step's output.

    Returns:
      The states, the final carry, and the evidence `[L, B, T]`.
    """
    rows = tokenwise.whole_rows(prompt, plan, numbers)
    call = opening.open_call(
        params, rows, model, plan, numbers, None, False, prompt.prompt_lengths_B
    )

    def run(state: TokenState, scanned: Any) -> tuple[TokenState, LayerRecord]:
        if not (call.quantizes or call.fuses):
            after, _, record, _ = layer.run(call, state, None, *scanned)
            return after, record
        fixed, frozen = jax.tree.map(lax.stop_gradient, (state, call.embedded_BTD))
        acting = call._replace(embedded_BTD=frozen)
        after, _, record, _ = layer.run(acting, fixed, None, *scanned)
        smooth = layer.run(Straight(*call), state, None, *scanned)[0].h_BTD
        # Adds exactly nothing to the value.
        passed = smooth - lax.stop_gradient(smooth)
        return after.replace(h_BTD=lax.stop_gradient(after.h_BTD) + passed), record

    @jax.checkpoint  # a layer's attention weights are made again rather than kept
    def body(state: TokenState, scanned: Any) -> tuple[TokenState, tuple[Array, LayerRecord]]:
        after, record = run(state, scanned)
        return after, (after.h_BTD, record)

    weights = layer.weights_of(call, params["layers"])
    scanned = (numbers.layers, weights, pasts.by_layer(None))
    state, (states_LBTD, record) = lax.scan(body, opening.start(call), scanned)
    return states_LBTD, state, record
