"""int8 execution of AMQ: int8 x int8 -> int32 products, and int8 keys and values (paper 2.5, E).

Activations have one step a vector. With a = max |x|, the 8-bit code floor(128 x / a), clipped to
-128..127, nests: its top b bits are the b-bit code k, and k stands for the middle of its bin,

    x^_d = s (k_d + 1/2),   s = a / 2^(b - 1).

Weights have one scale an output channel and are rounded to the nearest: w^_do = t_o m_do with
t_o = max_d |w_do| / 127. The product of a token and a channel is then

    y_o = sum_d x^_d w^_do = (s t_o / 2) (2 sum_d k_d m_do + sum_d m_do).

Sliced codes of 4 and 2 bits are small int8 numbers, so tokens of all widths ride in one
`dot_general`; the middle of the bins is the column sum of the weight codes, counted once. The
bracket is an exact int32; what is left is one multiplication.

The codes are those of fake quantisation with `group=0` (the whole vector) and `symmetric=True`, so
y differs from the fake-quantised float product by the rounding of the weights alone:

    |y_o - sum_d x^_d w_do| <= t_o / 2 sum_d |x^_d|,

and that from the unquantised product by at most s / 2 sum_d |w_do|.
"""

from __future__ import annotations

from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from qs_jax.config import AMQConfig
from qs_jax.errors import ConfigError
from qs_jax.mechanisms import amq
from qs_jax.models.layers import exact_dtype

# |2 k + 1| <= 255 and |m| <= 127: with more channels the int32 could overflow.
MOST_CHANNELS = (2**31 - 1) // (255 * 127)
_WHOLE = AMQConfig.uniform(8, 1, group=0, symmetric=True)


@no_type_check  # JAX rebuilds these with placeholders, see qs_jax/state.py
class QTensor(flax.struct.PyTreeNode):
    """Vectors as codes of a step each: `scale * (codes + 1/2)`.

    Attributes:
      codes: 8-bit codes, or their top bits.
      scale: Step of each vector.
    """

    codes: Int8[Array, "*batch C"]
    scale: Float[Array, "*batch"]


@no_type_check
class QWeights(flax.struct.PyTreeNode):
    """A projection, of one layer or stacked: `scale * codes`.

    Attributes:
      codes: Rounded to the nearest, -127..127.
      scale: One an output channel.
      sums: Of the codes of each output channel.
    """

    codes: Int8[Array, "*L D O"]
    scale: Float[Array, "*L O"]
    sums: Int[Array, "*L O"]


def encode(x: Float[Array, "*batch C"], bits: Int[Array, "*#batch"]) -> QTensor:
    """Codes of each vector at its own number of bits; 16 counts as 8.

    Args:
      x: Inputs of a projection `[B, T, C]`, or keys or values `[B, T, K, H]`.
      bits: 2, 4, 8 or 16; broadcasts against the vectors: `bits_BT[..., None]` for keys.
    """
    codes, _, span = amq.code(x.astype(exact_dtype(x.dtype)), _WHOLE)
    kept = jnp.minimum(bits, 8)
    sliced = amq.slice_code(codes[..., 0, :] - 128, kept[..., None])
    step = span[..., 0, 0] / (1 << kept).astype(span.dtype)
    return QTensor(sliced.astype(jnp.int8), step)


def decode(vectors: QTensor) -> Float[Array, "*batch C"]:
    """The vectors that codes stand for, in the dtype of their scale."""
    return (vectors.codes.astype(vectors.scale.dtype) + 0.5) * vectors.scale[..., None]


def encode_kv(k_BTKH: Float[Array, "B T K H"], bits_BT: Int[Array, "B T"]) -> QTensor:
    """Keys or values as the cache holds them: codes `[B, T, K, H]`, one scale `[B, T, K]` a head.

    A cache has one dtype: a slice of 4 or 2 bits takes a byte like the whole code.
    """
    return encode(k_BTKH, bits_BT[..., None])


decode_kv = decode


def product(
    x: Float[Array, "*batch D"],
    bits: Int[Array, "*#batch"],
    weights: QWeights,
    bias_O: Float[Array, "O"] | None = None,
) -> Float[Array, "*batch O"]:
    """A projection in int8: every token rides at its own bits (16: at 8, the width of the product).

    Args:
      x: Inputs.
      bits: Of each token.
      weights: Of one layer.
      bias_O: Added in full precision.

    Returns:
      In the dtype of `x`.
    """
    vectors = encode(x, bits)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    dots = lax.dot_general(vectors.codes, weights.codes, dims, preferred_element_type=jnp.int32)

    def row(vector_O: Array) -> Array:
        return vector_O.reshape((1,) * (x.ndim - 1) + vector_O.shape)

    exact = vectors.scale.dtype
    whole = (2 * dots + row(weights.sums)).astype(exact)
    out = whole * (vectors.scale[..., None] * row(weights.scale.astype(exact) / 2))
    out = out if bias_O is None else out + row(bias_O.astype(exact))
    return out.astype(x.dtype)


@jax.jit
def quantize_kernel(kernel: Float[Array, "*L D O"]) -> QWeights:
    """Codes, scales and column sums of a projection.

    Raises:
      ConfigError: It has so many input channels that the int32 could overflow.
    """
    if kernel.shape[-2] > MOST_CHANNELS:
        raise ConfigError(
            f"a projection of {kernel.shape[-2]} channels could overflow int32, {MOST_CHANNELS} "
            "is the most: use amq.execution 'fake'."
        )
    exact = kernel.astype(exact_dtype(kernel.dtype))
    scale = jnp.abs(exact).max(-2) / 127
    unit = exact / jnp.maximum(scale, jnp.finfo(exact.dtype).tiny)[..., None, :]
    codes = jnp.clip(jnp.round(unit), -127, 127).astype(jnp.int8)
    return QWeights(codes, scale, codes.sum(-2, dtype=jnp.int32))
