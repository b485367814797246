"""Choices by what they gain for each operation: neurons, heads, and numbers of a code.

All gains are in one unit, the mean squared error of later queries that a choice removes, so one
price for an operation ("water level") settles every size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

_sger: Any = scipy.linalg.get_blas_funcs("ger", dtype=np.float32)  # in place: a + alpha x y'


class Moments(NamedTuple):
    """Sums over tokens: of X'X, X'Z, Z'Z, and the tokens."""

    xx: np.ndarray
    xz: np.ndarray
    zz: np.ndarray
    tokens: float


def ridge(
    gram_FF: np.ndarray, cross_FO: np.ndarray, tokens: float, penalty: float, scale_F: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Solve (G + penalty n diag(scale)) M = C; also the Gram matrix with its penalty."""
    held = gram_FF + np.diag(tokens * (penalty * scale_F + 1e-9))
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(held), cross_FO), held


def left_over(moments: Moments, penalty: float) -> Float[np.ndarray, "Z Z"]:
    """Covariance of what of Z is not linear in X, whose last column is 1."""
    xx, xz, zz, tokens = moments
    scale = np.ones(len(xx))
    scale[-1] = 0
    map_XZ, _ = ridge(xx, xz, tokens, penalty, scale)
    cross = map_XZ.T @ xz
    return (zz - cross - cross.T + map_XZ.T @ xx @ map_XZ) / tokens


def neurons(
    covariance_FF: np.ndarray, reads_FE: np.ndarray, price: float, most: int
) -> tuple[Int[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """Forward selection: the neuron that removes most error, then both deflate, and so on.

    Args:
      covariance_FF: Of the neurons' own parts (`left_over`).
      reads_FE: What an error of each neuron does to later queries.
      price: Least gain worth taking.
      most: Stop after so many.

    Returns:
      The choice in its order, and the gain of each.
    """
    spread_F = np.sqrt(np.diag(covariance_FF) * (1 + 1e-4) + 1e-12)
    left = np.asfortranarray(covariance_FF / spread_F / spread_F[:, None], np.float32)
    left[np.diag_indices_from(left)] = 1.0
    shared = np.asfortranarray((reads_FE * spread_F[:, None]).T @ left, np.float32)
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < most:
        own = np.diagonal(left)
        gain = np.einsum("ef,ef->f", shared, shared) / np.maximum(own, 1e-3)
        gain[own < 1e-3] = 0
        gain[chosen] = -np.inf
        best = int(gain.argmax())
        if gain[best] <= price:
            break
        chosen.append(best)
        gains.append(float(gain[best]))
        root = np.sqrt(left[best, best])
        column, read = left[:, best] / root, shared[:, best] / root
        shared = _sger(-1.0, read, column, a=shared, overwrite_a=1)
        left = _sger(-1.0, column, column, a=left, overwrite_a=1)
    return np.array(chosen, int), np.array(gains)


def heads(
    covariance_QQ: np.ndarray, reads_QE: np.ndarray, head_dim: int, price: float
) -> list[int]:
    """Forward selection of whole heads; at least one is kept."""
    count = len(covariance_QQ) // head_dim

    def gain_of(kept: list[int]) -> float:
        at = np.concatenate([np.arange(head_dim * n, head_dim * (n + 1)) for n in kept])
        shared = covariance_QQ[at] @ reads_QE
        own = covariance_QQ[np.ix_(at, at)]
        own = own + np.eye(len(at)) * (1e-6 * np.trace(own) / len(at) + 1e-12)
        return float((shared * np.linalg.solve(own, shared)).sum())

    kept: list[int] = []
    reached = 0.0
    while len(kept) < count:
        found = {n: gain_of([*kept, n]) for n in range(count) if n not in kept}
        best = max(found, key=found.__getitem__)
        if kept and found[best] - reached <= price:
            break
        kept, reached = [*kept, best], found[best]
    return sorted(kept)


def code(
    held_FF: np.ndarray,
    map_FO: np.ndarray,
    felt_FE: np.ndarray,
    tokens: float,
    price: float,
    most: int,
    step: int,
) -> tuple[Float[np.ndarray, "F R"], Float[np.ndarray, "R O"]]:
    """The map through the few numbers that matter most to later queries: encoder and decoder.

    Reduced-rank regression (Izenman 1975) in a metric.

    Args:
      held_FF: Gram matrix of the features, with the penalty.
      map_FO: The whole map.
      felt_FE: The map with its outputs in the metric.
      tokens: Tokens that the Gram matrix sums.
      price: Least gain of a number worth taking.
      most: Numbers at most.
      step: Their number is a multiple of this, where it can be.
    """
    root_FF = np.linalg.cholesky(held_FF).T
    felt = root_FF @ felt_FE
    tall = felt.shape[0] > felt.shape[1]
    gram = felt.T @ felt if tall else felt @ felt.T
    size = len(gram)
    most = min(most, size)
    values, basis = scipy.linalg.eigh(gram, subset_by_index=[size - most, size - 1])
    rank = rounded(int((values / tokens > price).sum()), min(step, most), most)
    basis = basis[:, ::-1][:, :rank]
    if tall:
        basis, _ = np.linalg.qr(felt @ basis)
    encode_FR = scipy.linalg.solve_triangular(root_FF, basis)
    return encode_FR, basis.T @ (root_FF @ map_FO)


def rounded(count: int, step: int, most: int) -> int:
    """A number of neurons, heads or code numbers as programs like it: a multiple of a step."""
    return min(max(round(count / step), 1) * step, most)
