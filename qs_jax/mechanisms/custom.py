"""What a halting score and a KV policy of the user's own are given, and what they must give.

`HaltingConfig(rule="quota", score=f)` ranks a prompt by `f(signals) -> [B, T]`, lower stops sooner.
`KVSkipConfig(policy=p)` fills in the deeper keys and values of tokens that stopped, by
`p.keys_values(frozen, layer) -> k, v`. Both are pure JAX, hashable and without state. What they may
look at is the law of `qs_jax.testing.check_laws`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.config.fields import name_of
from qs_jax.errors import ConfigError
from qs_jax.models.layers import product, split_keys_values
from qs_jax.state import exact_dtype


@no_type_check
class Signals(flax.struct.PyTreeNode):
    """What a score reads after a layer, of the tokens of each row.

    The prompt engine leaves out tokens that stopped, so T may be less than the row's width, and
    what is read of a token that is not `ready_BT` may differ between engines.

    Attributes:
      pos_BT: Positions in the row.
      ready_BT: The tokens that are ranked: they may stop, and have not.
      lengths_B: Lengths of the prompts, in tokens.
      layer: The layer's number.
      drift_BT: Distance from before to after, by `HaltingConfig.drift`.
      entropy_BT: By `HaltingConfig.entropy`, in nats, of tokens that are ready.
      before_BTD: States `[B, T, D]` before the layer.
      after_BTD: States after it.
      keys_BTKH: Its keys `[B, T, K, H]`, after RoPE, as attention sees them.
      values_BTKH: Its values.
      received_BT: Attention received: maximum over heads and the prompt's last `score_queries`.
    """

    pos_BT: Int[Array, "B T"]
    ready_BT: Bool[Array, "B T"]
    lengths_B: Int[Array, "B"]
    layer: Int[Array, ""]
    drift_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"]
    # Engines leave out what the score does not read.
    before_BTD: Any = None
    after_BTD: Any = None
    keys_BTKH: Any = None
    values_BTKH: Any = None
    received_BT: Any = None

    @classmethod
    def of(
        cls,
        rows: Any,
        ready_BT: Bool[Array, "B T"],
        layer: Int[Array, ""],
        drift_BT: Float[Array, "B T"],
        entropy_BT: Float[Array, "B T"],
        read: Mapping[str, Array],
    ) -> Signals:
        """The signals of `Rows`; `read` has those of the layer."""
        told = (rows.pos_BT, ready_BT, rows.prompt_lengths_B, layer, drift_BT, entropy_BT)
        return cls(*told, **read)


class Frozen(NamedTuple):
    """What a KV policy reads of tokens that stopped; each token's keys may read that token only.

    Attributes:
      h_BTD: Frozen states.
      embedded_BTD: Input embeddings.
      previous_BTD: State of the token before, when this one stopped; zeros at the row's start.
      pos_BT: Positions in the row.
      depth_BT: Layers that the token ran.
      model: Architecture.
      project: The layer's own keys, before RoPE, and values `[B, T, K, H]` of the frozen states:
        what the policy "propagate" writes.
    """

    h_BTD: Float[Array, "B T D"]
    embedded_BTD: Float[Array, "B T D"]
    previous_BTD: Float[Array, "B T D"]
    pos_BT: Int[Array, "B T"]
    depth_BT: Int[Array, "B T"]
    model: ModelConfig
    project: Callable[[], tuple[Array, Array]]


# --- checks, by abstract evaluation ---------------------------------------------------------------


def _abstract(model: ModelConfig, *shape: int, dtype: Any = None) -> Any:
    dtype = jax.dtypes.canonicalize_dtype(dtype or model.dtype)
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_signals(model: ModelConfig, batch: int, width: int) -> Signals:
    """Shapes and dtypes of what a score reads."""
    of = functools.partial(_abstract, model)
    states, kv = (model.hidden_size,), (model.num_kv_heads, model.head_dim)
    number = of(batch, width, dtype=exact_dtype(model.dtype))
    pos, ready = (of(batch, width, dtype=dtype) for dtype in (jnp.int32, bool))
    lengths, layer = of(batch, dtype=jnp.int32), of(dtype=jnp.int32)
    of_layer = (of(batch, width, *sizes) for sizes in (states, states, kv, kv))
    given: Any = (pos, ready, lengths, layer, number, number, *of_layer, number)
    return Signals(*given)


@functools.lru_cache(maxsize=256)
def reads(score: Any, model: ModelConfig) -> frozenset[str]:
    """Names of the `Signals` that a score reads.

    Raises:
      ConfigError: It is no pure function of `Signals` that gives a number for each token.
    """
    given = abstract_signals(model, 2, 16)
    try:
        found = jax.make_jaxpr(score)(given)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"halting.score {name_of(score)} is no pure JAX: {error}") from error
    shapes = [out.shape for out in found.out_avals]
    if shapes != [given.pos_BT.shape]:
        raise ConfigError(f"halting.score {name_of(score)} gives {shapes}, not one [B, T].")
    # It looks into calls, such as those of `jax.jit`.
    _, used = partial_eval.dce_jaxpr(found.jaxpr, [True])
    names = [field.name for field in dataclasses.fields(Signals)]
    return frozenset(name for name, is_used in zip(names, used, strict=True) if is_used)


def abstract_policy(policy: Any, model: ModelConfig, width: int) -> tuple[Any, tuple[Any, ...]]:
    """A function that calls a policy for one row of so many tokens, and its abstract arguments."""
    of = functools.partial(_abstract, model)
    states, numbers = of(1, width, model.hidden_size), of(1, width, dtype=jnp.int32)
    kernel, layer = of(model.hidden_size, 2 * model.kv_size), of(dtype=jnp.int32)

    def call(arrays: Any, kernel: Any, layer: Any) -> Any:
        project = lambda: split_keys_values(product(arrays[0], kernel).astype(kernel.dtype), model)  # noqa: E731
        frozen: Any = (*arrays, model, project)
        return policy.keys_values(Frozen(*frozen), layer)

    return call, ((states, states, states, numbers, numbers), kernel, layer)


@functools.lru_cache(maxsize=256)
def check_policy(policy: Any, model: ModelConfig) -> None:
    """Raise `ConfigError` unless a policy is pure JAX and gives keys and values `[B, T, K, H]`."""
    call, given = abstract_policy(policy, model, 16)
    try:
        found = jax.eval_shape(call, *given)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"kv_skip.policy {name_of(policy)} is no pure JAX: {error}") from error
    shapes = [leaf.shape for leaf in jax.tree.leaves(found)]
    expected = [(1, 16, model.num_kv_heads, model.head_dim)] * 2
    if shapes != expected:
        raise ConfigError(
            f"kv_skip.policy {name_of(policy)} gives {shapes}, expected k and v {expected}."
        )
