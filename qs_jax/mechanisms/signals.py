"""Signals of decisions: how far a layer moved a token, and how unsure the token still is.

Sources: paper 2.1 and B.1 (drift, entropy), 2.5 and E.1 (entropy for AMQ), FAQ (latent variance).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.models import Params, head
from qs_jax.state import TokenState, exact_dtype

# entropy_of(estimator, needed_BT) -> [B, T] in nats.
EntropyOf: TypeAlias = Callable[[str, Array], Array]

_TINY = 1e-12


def drift(kind: str, after_BTD: Array, before_BTD: Array) -> Array:
    """Distance a layer moved each token: "raw" L2 (the paper), "relative", or 1 - "cosine"."""
    exact = exact_dtype(after_BTD.dtype)
    after, before = after_BTD.astype(exact), before_BTD.astype(exact)
    if kind == "cosine":
        norms = jnp.linalg.norm(after, axis=-1) * jnp.linalg.norm(before, axis=-1)
        return 1 - (after * before).sum(-1) / jnp.maximum(norms, _TINY)
    moved = jnp.linalg.norm(after - before, axis=-1)
    if kind == "raw":
        return moved
    return moved / jnp.maximum(jnp.linalg.norm(after, axis=-1), _TINY)


def entropy_of(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Entropy of softmax(logits), in nats: -sum p log p."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -(jnp.exp(logp) * logp).sum(-1)


def entropy(
    kind: str,
    h_BTD: Float[Array, "B T D"],
    params: Params,
    model: ModelConfig,
    shortlist_BTX: Int[Array, "B T X"] | None,
    previous_BT: Float[Array, "B T"] | None,
) -> Float[Array, "B T"]:
    """Entropy of each token by one of the estimators, in nats.

    "vocab": the exact logit lens. "shortlist": softmax over the ids in `shortlist_BTX` only.
    "latent": softmax over the RMS-normalised state. "variance": log variance of the state's
    channels (not an entropy; it can be negative). "final_prev": the entropy of the model's output
    one position earlier, `previous_BT`.
    """
    h = h_BTD.astype(exact_dtype(h_BTD.dtype))
    if kind == "vocab":

        def exact(h_BCD: Array) -> Array:
            return entropy_of(head.lens(params, h_BCD, model))

        return head.map_positions(exact, model.vocab_size, h_BTD)
    if kind == "shortlist":
        assert shortlist_BTX is not None

        def short(h_BCD: Array, ids_BCX: Array) -> Array:
            rows_BCXD = head.head_rows(params, ids_BCX)
            normed = head.normed(params, h_BCD, model)
            exact = {"preferred_element_type": exact_dtype(normed.dtype)}
            return entropy_of(jnp.einsum("bcd,bcxd->bcx", normed, rows_BCXD, **exact))

        width = shortlist_BTX.shape[-1] * model.hidden_size
        return head.map_positions(short, width, h_BTD, shortlist_BTX)
    if kind == "latent":
        rms = jnp.sqrt((h * h).mean(-1, keepdims=True))
        return entropy_of(h / jnp.maximum(rms, _TINY))
    if kind == "variance":
        return jnp.log(jnp.maximum(h.var(-1), _TINY))
    assert kind == "final_prev"
    assert previous_BT is not None
    return previous_BT


def entropies(
    state: TokenState, params: Params, model: ModelConfig, previous_BT: Array | None = None
) -> EntropyOf:
    """Entropies of states after a layer; zeros where no token is needed."""

    def entropy_of(kind: str, needed_BT: Bool[Array, "B T"]) -> Float[Array, "B T"]:
        def compute() -> Array:
            with jax.named_scope("signals"):
                return entropy(kind, state.h_BTD, params, model, state.shortlist_BTX, previous_BT)

        nothing_BT = jnp.zeros(needed_BT.shape, exact_dtype(model.dtype))
        return jax.lax.cond(needed_BT.any(), compute, lambda: nothing_BT)

    return entropy_of


def largest_entropy(kind: str, model: ModelConfig, shortlist_size: int) -> float:
    """The largest value an estimator can give, in nats."""
    sizes = {"shortlist": shortlist_size, "latent": model.hidden_size}
    return math.log(sizes.get(kind, model.vocab_size))


def pick_shortlist_at(
    here: Bool[Array, ""], state: TokenState, params: Params, model: ModelConfig
) -> TokenState:
    """The state with the most likely ids by its logit lens, if this is the layer to pick them."""
    ids_BTX = state.shortlist_BTX
    if ids_BTX is None:
        return state

    def pick(h_BCD: Array) -> Array:
        size = ids_BTX.shape[-1]
        return jax.lax.top_k(head.lens(params, h_BCD, model), size)[1].astype(jnp.int32)

    picked = lambda: head.map_positions(pick, model.vocab_size, state.h_BTD)  # noqa: E731
    return state.replace(shortlist_BTX=jax.lax.cond(here, picked, lambda: ids_BTX))


def token_probability(h_BTD: Array, tokens_BT: Array, params: Params, model: ModelConfig) -> Array:
    """Probability of each token by the logit lens of the state given for it."""

    def probability(h_BCD: Array, ids_BC: Array) -> Array:
        logp = jax.nn.log_softmax(head.lens(params, h_BCD, model), axis=-1)
        return jnp.exp(jnp.take_along_axis(logp, ids_BC[..., None], axis=-1)[..., 0])

    return head.map_positions(probability, model.vocab_size, h_BTD, tokens_BT)
