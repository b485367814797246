"""Distributions of the signals on real text, from which thresholds are taken.

Rules of the paper: 25th percentile of drift and of entropy (B.2), 95th percentile of the attention
to halted tokens (C.3), 15th percentile of the distance of neighbours (D.3).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from qs_jax.config import ModelConfig
from qs_jax.engine import dense
from qs_jax.engine.attention import attention, in_window
from qs_jax.engine.weights import check_params
from qs_jax.errors import InputError
from qs_jax.jax_settings import default_settings
from qs_jax.mechanisms import fusion, signals
from qs_jax.models import Params
from qs_jax.models.cpu import stored_params

PERCENTS = (1, 5, 10, 15, 25, 50, 75, 90, 95, 99)
_HALTED_PERCENT, _KV_PERCENT, _FUSE_PERCENT = 25, 95, 15
_FUSE_DEPTHS = (10 / 30, 15 / 30, 20 / 30)  # D.3 samples layers 10, 15 and 20 of 30


@dataclasses.dataclass(frozen=True)
class Observed:
    """Signals of the dense model, layer by layer, at a sample of positions.

    Attributes:
      tokens: Sampled tokens.
      percentiles: `[L, Q]` of each signal; row l - 1 is layer l, columns are `PERCENTS`. "drift"
        and "distance" (of a state and its left neighbour's) are raw, "relative_drift" and
        "relative_distance" over the norms. "entropy" is of the exact logit lens, in nats.
        "received" is the most attention that any head of any later query pays to a token that has
        been under both 25th percentiles at this layer or before; nan if there are none.
      tau_kv: 95th percentile of "received" over all layers (C.3).
      tau_fuse: 15th percentile of the raw distance at a third, half and two thirds of the depth.
    """

    tokens: int
    percentiles: dict[str, Float[np.ndarray, "L Q"]]
    tau_kv: float
    tau_fuse: float

    def at(self, name: str, percent: int) -> tuple[float, ...]:
        """A percentile (one of `PERCENTS`) of a signal at every layer: a threshold of L numbers."""
        return tuple(self.percentiles[name][:, PERCENTS.index(percent)].tolist())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; nan is None."""
        tables = {
            name: [[None if math.isnan(x) else x for x in row] for row in table_LQ.tolist()]
            for name, table_LQ in self.percentiles.items()
        }
        thresholds = {"tau_kv": self.tau_kv, "tau_fuse": self.tau_fuse}
        return {"percents": list(PERCENTS), "tokens": self.tokens, **tables, **thresholds}


@default_settings()
def observe(
    params: Params,
    tokens_WT: Int[np.ndarray, "W T"],
    model: ModelConfig,
    *,
    positions: int = 64,
    batch_size: int = 4,
    progress: bool = False,
) -> Observed:
    """Run the dense model over windows and take the percentiles of its signals.

    Args:
      params: From `qs_jax.load`.
      tokens_WT: Windows, all of one length.
      model: Architecture.
      positions: Tokens sampled from each window.
      batch_size: Windows at a time.
      progress: Show a progress bar.

    Raises:
      ConfigError: The parameters are another model's.
      InputError: A window has fewer than three tokens: none has a neighbour and a later query.
    """
    check_params(params, model)
    windows, width = tokens_WT.shape
    if width < 3 or not windows:
        raise InputError(f"windows of {width} tokens are too short to observe: 3 are needed.")
    rng = np.random.default_rng(0)
    count = min(positions, width - 2)
    sample = [np.sort(rng.choice(width - 2, count, replace=False)) + 1 for _ in range(windows)]
    sample_WP = np.array(sample, np.int32)
    program, held, parts = jax.jit(_signals, static_argnames="model"), stored_params(params), []
    for start in tqdm(range(0, windows, batch_size), "observing", disable=not progress):
        rows = slice(start, start + batch_size)
        parts.append(jax.device_get(program(held, tokens_WT[rows], sample_WP[rows], model=model)))
    return summarize(jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *parts))


def summarize(signals_LWP: dict[str, np.ndarray]) -> Observed:
    """Percentiles of sampled signals, each `[L, W, P]`, by their names in `Observed`."""
    flat_LN = {k: x.reshape(len(x), -1).astype(float) for k, x in signals_LWP.items()}
    low_LN = [
        flat_LN[name] < np.percentile(flat_LN[name], _HALTED_PERCENT, axis=1, keepdims=True)
        for name in ("drift", "entropy")
    ]
    halted_LN = np.logical_or.accumulate(low_LN[0] & low_LN[1], axis=0)
    halted_LN[-1:] = False  # nothing is left to skip after the last layer
    received_LN = np.where(halted_LN, flat_LN["received"], np.nan)
    of_halted = received_LN[halted_LN]
    depth, tokens = halted_LN.shape
    at = sorted({min(max(round(share * depth), 1), depth) - 1 for share in _FUSE_DEPTHS})
    percentiles = {name: np.percentile(x_LN, PERCENTS, axis=1).T for name, x_LN in flat_LN.items()}
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # layers of nan alone
        percentiles["received"] = np.nanpercentile(received_LN, PERCENTS, axis=1).T
    return Observed(
        tokens=tokens,
        percentiles=percentiles,
        tau_kv=float(np.percentile(of_halted, _KV_PERCENT)) if len(of_halted) else 0.0,
        tau_fuse=float(np.percentile(flat_LN["distance"][at], _FUSE_PERCENT)),
    )


def _signals(params: Params, tokens_BT, sample_BP, model: ModelConfig) -> dict[str, Any]:
    """Each signal `[L, B, P]` at the sampled positions, none the first or the last of its row."""
    batch, width = tokens_BT.shape
    pos_1T = jnp.arange(width)[None]
    mask_1TT = jnp.tri(width, dtype=bool)[None] & in_window(pos_1T, pos_1T, model.sliding_window)
    mask_BTT = jnp.broadcast_to(mask_1TT, (batch, width, width))

    def attend(q, k, v):
        context, weights_BNTS = attention(q, k, v, mask_BTT, None)
        # A token's weight on itself says nothing about what others read from it.
        others_BTS = jnp.where(jnp.eye(width, dtype=bool), 0, weights_BNTS.max(1))
        return context, others_BTS.max(1)

    def take(array_BT: Any, index_BP=sample_BP):
        index = index_BP.reshape(*index_BP.shape, *[1] * (array_BT.ndim - 2))
        return jnp.take_along_axis(array_BT, index, axis=1)

    def look(before_BTD, after_BTD, received_BT) -> dict[str, Any]:
        before, after, left = take(before_BTD), take(after_BTD), take(after_BTD, sample_BP - 1)
        return {
            "drift": signals.drift("raw", after, before),
            "relative_drift": signals.drift("relative", after, before),
            "entropy": signals.entropy("vocab", after, params, model, None, None),
            "distance": fusion.distances(after, left, "raw"),
            "relative_distance": fusion.distances(after, left, "relative"),
            "received": take(received_BT),
        }

    return dense.look_at_layers(params, tokens_BT, model, look, attend)[1]
