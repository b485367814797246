"""The masked engine: the definition of every mechanism, as mask arithmetic in one `lax.scan`.

Every token is computed at every layer and the decisions select what counts, so nothing is saved
here: savings are simulated. `run` takes a whole batch of rows (scoring, prefill) or one token a row
after a `Past` (decoding); both go through the same layer.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.engine import layer, opening
from qs_jax.engine import past as pasts
from qs_jax.mechanisms import decide
from qs_jax.mechanisms.plan import Numbers, Plan
from qs_jax.models import Params, head
from qs_jax.state import KVCache, LayerRecord, Past, TokenState


def run(
    params: Params,
    rows: decide.Rows,
    model: ModelConfig,
    plan: Plan,
    numbers: Numbers,
    past: Past | None = None,
    capacity: int | None = None,
    prompt_lengths_B: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], TokenState, LayerRecord, Past | None]:
    """Run tokens through all layers under the mechanisms.

    Args:
      params: Stacked tree, with "kv_maps" where the policy extrapolates.
      rows: Tokens: whole rows from position 0, or, with a past, one token a row.
      model: Architecture.
      plan: Static half of the configuration.
      numbers: Traced half.
      past: Of the tokens before; None at the start of a row.
      capacity: Slots of a new `Past`; None keeps none.
      prompt_lengths_B: Tokens of each row's prompt; only planned capacities need it.

    Returns:
      Normed states, the final carry, the evidence `[L, B, T]`, and the past of the next token.
    """
    keeps = past is not None or capacity is not None
    call = opening.open_call(params, rows, model, plan, numbers, past, keeps, prompt_lengths_B)
    cache: Any = past.cache if past is not None else None
    if capacity is not None:
        cache = KVCache.zeros(model, rows.tokens_BT.shape[0], capacity)

    def body(carry, scanned):
        state, cache, record, kept = layer.run(call, *carry, *scanned)
        return (state, cache), (record, kept)

    weights = layer.weights_of(call, params["layers"])
    scanned = (numbers.layers, weights, pasts.by_layer(past))
    (state, cache), (record, kept) = lax.scan(body, (opening.start(call), cache), scanned)
    following = None
    if cache is not None:
        assert kept is not None
        follow = pasts.begin if past is None else pasts.extend
        following = follow(call, state, record, kept, cache)
    return head.normed(params, state.h_BTD, model), state, record, following
