"""The model families in NumPy float64, one token at a time, for the oracle.

Written from the definitions, for clarity alone: it shares no line with `qs_jax.models`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qs_jax.config import ModelConfig

TINY = 1e-12


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def entropy(logits: np.ndarray) -> float:
    """Of the softmax of logits `[V]`, in nats."""
    shifted = logits - logits.max()
    log_p = shifted - np.log(np.exp(shifted).sum())
    return float(-(np.exp(log_p) * log_p).sum())


def rms(x: np.ndarray) -> float:
    """Root mean square of `[D]`."""
    return float(np.sqrt((x**2).mean()))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of the angle between `[D]` and `[D]`."""
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), TINY))


def hadamard(size: int) -> np.ndarray:
    """Orthonormal Sylvester matrix `[G, G]`: sign (-1)^(number of bits that i and j share)."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return np.array(signs, float) / math.sqrt(size)


def fake_quant(
    x: np.ndarray, bits: int, group: int, symmetric: bool, rotate: bool
) -> tuple[np.ndarray, float]:
    """Quantise and dequantise groups along the last axis.

    Args:
      x: `[..., D]`.
      bits: 2, 4 or 8; 16 leaves `x` alone.
      group: Channels that share a scale; divides D.
      symmetric: Scale by the largest magnitude.
      rotate: Hadamard rotation inside each group.

    Returns:
      The same shape, and how far the nearest value was from the edge between two codes, in codes.
    """
    if bits == 16:
        return x, math.inf
    turn, levels, edge = hadamard(group) if rotate else np.eye(group), 2**bits, math.inf
    groups = x.reshape(-1, group)
    out = np.empty_like(groups)
    for row, values in enumerate(groups):
        turned = turn @ values
        low = -abs(turned).max() if symmetric else turned.min()
        span = -2 * low if symmetric else turned.max() - low
        if span == 0:
            out[row] = turn @ np.full(group, low)
            continue
        scaled = (turned - low) / span
        code = np.clip(np.floor(256 * scaled).astype(int), 0, 255) >> (8 - bits)
        out[row] = turn @ (low + (code + 0.5) / levels * span)
        # The ends of the range are no edges: the lowest value has code 0, the highest is clipped.
        edges = np.arange(1, levels)
        edge = min(edge, float(abs(scaled[:, None] * levels - edges[None, :]).min()))
    return out.reshape(x.shape), edge


def rotation(channels: int) -> np.ndarray:
    """What int8 products rotate with: Hadamard blocks of at most 64 channels, `[D, D]`."""
    size = math.gcd(channels, 64)
    return np.kron(np.eye(channels // size), hadamard(size))


def int8_quant(x: np.ndarray, bits: int, group: int, rotate: bool) -> tuple[np.ndarray, float]:
    """What int8 stands for: codes of 8 bits with one step, of which each group keeps its top ones.

    Args:
      x: `[..., D]`.
      bits: 2, 4 or 8; 16 leaves `x` alone.
      group: Channels that keep the same bits; divides D.
      rotate: Rotate before and after.

    Returns:
      The same shape, and how far the nearest value was from the edge between two codes, in codes.
    """
    if bits == 16:
        return x, math.inf
    turn = rotation(x.shape[-1]) if rotate else np.eye(x.shape[-1])
    turned, edge = (x @ turn).reshape(-1, x.shape[-1]), math.inf
    out = np.zeros_like(turned)
    for row, values in enumerate(turned):
        step = abs(values).max() / 127
        if step == 0:
            continue
        scaled = values / step
        edge = min(edge, float(abs(scaled - np.floor(scaled) - 0.5).min()))
        for start in range(0, len(values), group):
            codes = [round(float(value)) for value in scaled[start : start + group]]
            wide = 1  # bits that hold every code of the group, sign included
            while not all(-(2 ** (wide - 1)) <= code < 2 ** (wide - 1) for code in codes):
                wide += 1
            unit = 2 ** max(wide - bits, 0)
            middles = [code if unit == 1 else code // unit * unit + unit // 2 for code in codes]
            out[row, start : start + group] = np.array(middles) * step
    return out.reshape(x.shape) @ turn.T, edge


class OracleModel:
    """A checkpoint as functions of single states `[D]`; layers are numbered from 1.

    Attributes:
      model: Architecture.
      table: Output embedding `[V, D]`.
    """

    def __init__(self, params: dict[str, Any], model: ModelConfig) -> None:
        assert model.rope_scaling is None, "the oracle knows plain RoPE only"
        self.model = model
        self.embeddings = _floats(params["embed"])
        self.layers = _floats(params["layers"])
        self.final_norm = _floats(params["final_norm"])["norm"]
        self.table = _floats(params["head"] if "head" in params else params["embed"])["tokens"]

    def embed(self, token: int, position: int) -> np.ndarray:
        """State `[D]` before the first layer."""
        h = self.embeddings["tokens"][token]
        return h + self.embeddings["positions"][position] if "positions" in self.embeddings else h

    def linear(self, name: str, layer: int, x: np.ndarray) -> np.ndarray:
        """One projection of a layer."""
        weights = {leaf: array[layer - 1] for leaf, array in self.layers[name].items()}
        return x @ weights["kernel"] + weights.get("bias", 0.0)

    def norm(self, name: str, layer: int, h: np.ndarray) -> np.ndarray:
        """One norm of a layer."""
        return self._norm({leaf: array[layer - 1] for leaf, array in self.layers[name].items()}, h)

    def qkv(self, layer: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Query `[N, H]`, and key and value in one row `[2 K H]`, none of them rotated."""
        m, qkv = self.model, self.linear("qkv", layer, x)
        heads = qkv.reshape(-1, m.head_dim).copy()
        if m.qk_norm:
            for n in range(m.num_heads + m.num_kv_heads):
                name = "q_norm" if n < m.num_heads else "k_norm"
                heads[n] = self.norm(name, layer, heads[n])
        return heads[: m.num_heads], heads[m.num_heads :].reshape(-1)

    def rotate(self, x: np.ndarray, position: int) -> np.ndarray:
        """RoPE of heads `[X, H]`; nothing in a model with learned positions."""
        if self.model.rope_theta is None:
            return x
        half, out = self.model.head_dim // 2, np.empty_like(x)
        for i in range(half):
            angle = position * self.model.rope_theta ** (-i / half)
            a, b = x[:, i], x[:, i + half]
            out[:, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def mlp_inner(self, layer: int, x: np.ndarray) -> np.ndarray:
        """Input of the down projection, `[F]`."""
        if "gate_up" not in self.layers:
            return self._activate(self.linear("up", layer, x))
        gate_up, width = self.linear("gate_up", layer, x), self.model.mlp_size
        return self._activate(gate_up[:width]) * gate_up[width:]

    def attended(
        self, layer: int, h: np.ndarray, heads: Sequence[int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A row `[T, D]` after attention of some heads, or of all; also its keys and values."""
        m, width = self.model, self.model.head_dim
        queries, kv = zip(
            *[self.qkv(layer, self.norm("attn_norm", layer, x)) for x in h], strict=True
        )
        shape, share = (m.num_kv_heads, width), m.num_heads // m.num_kv_heads
        keys = np.stack([self.rotate(x[: m.kv_size].reshape(shape), i) for i, x in enumerate(kv)])
        values = np.stack([x[m.kv_size :].reshape(shape) for x in kv])
        out = np.empty_like(h)
        for i, query in enumerate(queries):
            context = np.zeros((m.num_heads, width))
            for n in range(m.num_heads) if heads is None else heads:
                seen = slice(max(i + 1 - (m.sliding_window or i + 1), 0), i + 1)
                scores = keys[seen, n // share] @ self.rotate(query, i)[n] / math.sqrt(width)
                context[n] = softmax(scores) @ values[seen, n // share]
            out[i] = h[i] + self.linear("out", layer, context.reshape(-1))
        return out, np.stack(kv)

    def neurons(self, layer: int, h: np.ndarray) -> np.ndarray:
        """Inputs of the down projection for states `[T, D]`."""
        return np.stack([self.mlp_inner(layer, self.norm("mlp_norm", layer, x)) for x in h])

    def logits(self, h: np.ndarray) -> np.ndarray:
        """Final norm, then head: logits `[V]` of a state of any layer."""
        return self.table @ self._norm(self.final_norm, h)

    def _norm(self, weights: dict[str, np.ndarray], h: np.ndarray) -> np.ndarray:
        centred = h - h.mean() if "bias" in weights else h
        scaled = centred / np.sqrt((centred**2).mean() + self.model.norm_eps)
        return scaled * weights["scale"] + weights.get("bias", 0.0)

    def _activate(self, x: np.ndarray) -> np.ndarray:
        kind = self.model.activation
        if kind == "silu":
            return x / (1 + np.exp(-x))
        if kind == "relu":
            return np.maximum(x, 0.0)
        if kind == "gelu":
            return np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x])
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _floats(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _floats(branch) for name, branch in tree.items()}
    return np.asarray(tree).astype(np.float64)
