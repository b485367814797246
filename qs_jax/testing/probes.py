"""What a halting score and a KV policy of the user's own read, found by changing it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qs_jax.config import HaltingConfig, KVSkipConfig, ModelConfig
from qs_jax.config.fields import name_of
from qs_jax.mechanisms.custom import Signals, abstract_policy, abstract_signals
from qs_jax.mechanisms.halting import reads_of, score_of

WIDTH, LENGTHS = 16, (12, 9)
# The rest of what a score reads of a token, `received_BT` apart.
CONTENTS = "drift_BT entropy_BT before_BTD after_BTD keys_BTKH values_BTKH".split()


def probe_score(halting: HaltingConfig, model: ModelConfig) -> None:
    """Raise AssertionError if a score reads what lies after the prompt, or later tokens."""
    reads_of(halting, model)
    score, name, rng = jax.jit(score_of(halting)), name_of(halting.score), np.random.default_rng(0)
    pos_BT = np.broadcast_to(np.arange(WIDTH, dtype=np.int32), (len(LENGTHS), WIDTH))
    lengths_B = np.array(LENGTHS, np.int32)
    ready_BT = (pos_BT > 0) & (pos_BT < lengths_B[:, None] - 2)
    shapes = abstract_signals(model, len(LENGTHS), WIDTH)
    one, two = (_random(shapes, rng) for _ in range(2))
    for arrays, moved in ((one, 0), (two, 3)):
        arrays |= {"pos_BT": pos_BT + moved, "lengths_B": lengths_B + moved}
        arrays |= {"ready_BT": ready_BT & (pos_BT % 4 >= moved), "layer": np.int32(2)}

    def scores(arrays: dict[str, Any]) -> np.ndarray:
        return np.asarray(score(Signals(**jax.tree.map(jnp.asarray, arrays))))

    before_BT = scores(one)
    for row, length in enumerate(LENGTHS):
        outside_BT = np.ones_like(ready_BT)
        outside_BT[row, :length] = False
        after_BT = scores({name: _where(outside_BT, two[name], one[name]) for name in one})
        if (after_BT[row, :length] != before_BT[row, :length]).any():
            raise AssertionError(
                f"causality: halting.score {name} reads what lies after the prompt, in the padding "
                "or in other rows: scores of the prompt change with it."
            )
    ready = np.flatnonzero(ready_BT[0]).tolist()
    causal = [_unmoved(scores, one, two, at, before_BT) for at in ready]
    if all(causal):
        return
    for at in ready:
        after = scores(_shuffled(one, two, at, ready))[0, at]
        if not np.allclose(after, before_BT[0, at], rtol=1e-4, atol=1e-4):
            raise AssertionError(
                f"causality: halting.score {name} looks into the future: the score of a token "
                "changes with later ones, and is no statistic of ready tokens, in any order."
            )


def _random(shapes: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Random signals, as arrays by name."""
    floats = {name: getattr(shapes, name) for name in (*CONTENTS, "received_BT")}
    return {name: rng.random(x.shape).astype(x.dtype) for name, x in floats.items()}


def _where(mask_BT: np.ndarray, new: Any, old: Any) -> Any:
    """`new` at these tokens; of what a row has one of, where they are all of a row's."""
    if np.ndim(old) == 0:
        return old
    if np.ndim(old) == 1:
        return np.where(mask_BT.all(1), new, old)
    return np.where(mask_BT.reshape(*mask_BT.shape, *[1] * (np.ndim(old) - 2)), new, old)


def _unmoved(scores: Any, one: Any, two: Any, at: int, before_BT: np.ndarray) -> bool:
    """Whether a token's score stays when later tokens of its prompt change."""
    later_BT = np.zeros(before_BT.shape, bool)
    later_BT[0, at + 1 : LENGTHS[0]] = True
    changed = {name: _where(later_BT, two[name], one[name]) for name in CONTENTS}
    return bool(scores(one | changed)[0, at] == before_BT[0, at])


def _shuffled(one: Any, two: Any, at: int, ready: list[int]) -> dict[str, Any]:
    """The other ready tokens exchanged, and what is not ready changed."""
    others = [other for other in ready if other != at]
    changed = {}
    for name in (*CONTENTS, "received_BT"):
        array = np.array(one[name])
        unready = np.setdiff1d(np.arange(LENGTHS[0]), ready)
        array[0, unready] = two[name][0, unready]
        array[0, others] = one[name][0, np.roll(others, 1)]
        changed[name] = array
    return one | changed


def probe_policy(skip: KVSkipConfig, model: ModelConfig) -> None:
    """Raise AssertionError if a token's keys or values read another token."""
    rng = np.random.default_rng(0)
    call, shapes = abstract_policy(skip.policy, model, WIDTH)
    program = jax.jit(call)

    def some(x: Any) -> Any:
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        return rng.integers(0, WIDTH, x.shape, x.dtype) if whole else rng.random(x.shape)

    arrays, kernel, layer = jax.tree.map(lambda x: jnp.asarray(some(x), x.dtype), shapes)
    found = program(arrays, kernel, layer)
    for at in (0, WIDTH // 2, WIDTH - 1):
        others = [jnp.asarray(some(x), x.dtype).at[:, at].set(x[:, at]) for x in arrays]
        after = program(tuple(others), kernel, layer)
        if any((a[:, at] != b[:, at]).any() for a, b in zip(found, after, strict=True)):
            raise AssertionError(
                f"causality: kv_skip.policy {skip.name} reads other tokens: the keys or values of "
                f"token {at} change with them."
            )
