"""Adaptive Matryoshka quantization: bits by entropy, nested codes (paper 2.5, E)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import AMQConfig, ModelConfig
from qs_jax.halves import exact_dtype
from qs_jax.mechanisms.plan import Numbers
from qs_jax.mechanisms.signals import largest_entropy

FULL_BITS = 16  # not quantised


def assign_bits(
    entropy_BT: Float[Array, "B T"],
    subject_BT: Bool[Array, "B T"],
    full_BT: Bool[Array, "B T"],
    amq: AMQConfig,
    numbers: Numbers,
    model: ModelConfig,
    shortlist_size: int,
) -> Int[Array, "B T"]:
    """Bits of each token (E.2): 8 above tau_high, 2 below tau_low, 4 in between.

    An int8 product has one width, so under int8 execution no token keeps more than 8 bits.

    Args:
      entropy_BT: After fusion, in nats.
      subject_BT: Tokens the mechanisms act on; others keep `FULL_BITS`, or 8 in int8.
      full_BT: Tokens that do not go below 8 bits.
      amq: Normalisation.
      numbers: Thresholds.
      model: For the largest entropy.
      shortlist_size: For the largest entropy.
    """
    if amq.normalization == "log_vocab" and amq.entropy is not None:
        entropy_BT = entropy_BT / largest_entropy(amq.entropy, model, shortlist_size)
    elif amq.normalization == "minmax":  # over the batch, as E.1 says
        low = jnp.where(subject_BT, entropy_BT, jnp.inf).min()
        high = jnp.where(subject_BT, entropy_BT, -jnp.inf).max()
        entropy_BT = (entropy_BT - low) / jnp.maximum(high - low, 1e-12)
    bits_BT = jnp.where(entropy_BT > numbers.tau_high, 8, 4)
    bits_BT = jnp.where(entropy_BT < numbers.tau_low, 2, bits_BT)
    bits_BT = jnp.where(full_BT, 8, bits_BT)
    spared = FULL_BITS if amq.execution == "fake" else 8
    return jnp.where(subject_BT, bits_BT, spared).astype(jnp.int32)


def code(
    x: Float[Array, "*batch C"], amq: AMQConfig
) -> tuple[Int[Array, "*batch M G"], Array, Array]:
    """8-bit codes with the scale of each group: floor(256 (x - low) / range).

    A floor nests: the top 4 or 2 bits are floor(16 ...) and floor(4 ...), the codes a direct
    quantisation to 4 or 2 bits would give.

    Returns:
      Codes 0..255 `[..., C/G, G]`, and `low` and `range` `[..., C/G, 1]` of each group.
    """
    groups = x.reshape(*x.shape[:-1], -1, amq.group)
    tiny = jnp.finfo(x.dtype).tiny
    if amq.symmetric:
        high = jnp.abs(groups).max(-1, keepdims=True)
        low = -high
        # From zero up: zero is an edge between two codes, it must not fall with a rounding.
        edge = jnp.floor(groups / jnp.maximum(high, tiny) * 128) + 128
    else:
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        edge = jnp.floor((groups - low) / jnp.maximum(high - low, tiny) * 256)
    return jnp.clip(edge, 0, 255).astype(jnp.int32), low, high - low


def slice_code(codes: Int[Array, "*batch"], bits: Int[Array, "*#batch"]) -> Int[Array, "*batch"]:
    """The nested code of fewer bits: the top `bits` of the 8."""
    return codes >> (8 - bits)


def decode(codes: Array, bits: Array, low: Array, span: Array) -> Array:
    """Middle of each code's bin."""
    levels = (1 << bits).astype(span.dtype)
    return low + (codes.astype(span.dtype) + 0.5) / levels * span


def fake_quantize(
    x: Float[Array, "*batch C"], bits: Int[Array, "*batch"], amq: AMQConfig
) -> Float[Array, "*batch C"]:
    """Quantise and dequantise each vector at its own number of bits; `FULL_BITS` is untouched.

    Args:
      x: Vectors of C channels, C a multiple of the group.
      bits: 2, 4, 8 or `FULL_BITS`.
      amq: Group, symmetry, rotation.
    """
    exact = x.astype(exact_dtype(x.dtype))
    if amq.rotate:
        exact = rotate(exact, amq.group)
    codes, low, span = code(exact, amq)
    kept = jnp.minimum(bits, 8)[..., None, None]
    out = decode(slice_code(codes, kept), kept, low, span).reshape(x.shape)
    if amq.rotate:
        out = rotate(out, amq.group)  # the Sylvester matrix is symmetric: its own inverse
    return jnp.where((bits < FULL_BITS)[..., None], out.astype(x.dtype), x)


def rotate(x: Float[Array, "*batch C"], group: int) -> Float[Array, "*batch C"]:
    """Orthonormal Hadamard rotation inside each group."""
    matrix = jnp.asarray(hadamard(group), x.dtype)
    return (x.reshape(*x.shape[:-1], -1, group) @ matrix).reshape(x.shape)


@functools.lru_cache
def hadamard(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix over sqrt(size); `size` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)
