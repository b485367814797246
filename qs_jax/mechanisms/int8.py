"""int8 execution of AMQ: int8 x int8 -> int32 products, and int8 keys and values (paper 2.5, E).

**Rotation.** Language models have a few large channels, which would take all the steps of a vector.
An orthonormal Hadamard matrix R = R^-1 in blocks of channels spreads them over their block; the
weights are rotated once: x W = (x R) (R W). Below, x and w are rotated.

**Activations.** A vector has one step s = max |x| / 127 and the 8-bit codes c = round(x / s). At b
bits, every group of channels leaves out the high bits that none of its codes uses, keeps the next
b, and drops the r bits below; what is left stands for the middle of the codes it came from:

    n = 2^r floor(c / 2^r) + 2^(r-1),   or c where r = 0;   x^ = s n.

n is an int8 whatever the bits, so tokens of 8, 4 and 2 bits share one product.

**Weights.** One scale an output channel, rounded to the nearest: w^ = t m with t = max |w| / 127.

**Product.** y_o = sum_d x^_d w^_do = s t_o sum_d n_d m_do, where the sum is an exact int32.

**Bounds.** |x^ - x| <= s (2^r + 1) / 2, or s / 2 where r = 0, so

    |y_o - sum_d x^_d w_do| <= t_o / 2 sum_d |x^_d|             (int8 from its own simulation)
    |y_o - sum_d x_d w_do| <= that + sum_d |x^_d - x_d| |w_do|   (from the float product)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from qs_jax.errors import ConfigError
from qs_jax.mechanisms.last import LastMade
from qs_jax.models.quantized import with_floats
from qs_jax.state import FULL_BITS, exact_dtype

MOST_CHANNELS = (2**31 - 1) // 127**2  # with more, the int32 could overflow
LARGEST_ROTATION = 64  # channels: each costs 2 operations for every channel rotated with it


@no_type_check  # JAX rebuilds it with placeholders, see qs_jax/state.py
class QTensor(flax.struct.PyTreeNode):
    """Vectors in int8: `scale * codes`.

    Attributes:
      codes: -127..127. Activations and keys: vectors on the last axis. Weights: on the last but
        one, `[L, D, O]`.
      scale: Step of each vector: the shape without that axis.
    """

    codes: Int8[Array, "..."]
    scale: Float[Array, "..."]


def encode(x: Float[Array, "*batch C"], bits: Int[Array, "*#batch"], group: int) -> QTensor:
    """Codes of each vector at its own number of bits; 16 counts as 8. `group` divides C."""
    exact = x.astype(exact_dtype(x.dtype))
    scale = jnp.abs(exact).max(-1) / 127
    tiny = jnp.finfo(exact.dtype).tiny
    codes = jnp.round(exact / jnp.maximum(scale, tiny)[..., None]).astype(jnp.int32)
    # Where the scale is tiny itself, a quotient could leave the range.
    groups = jnp.clip(codes, -127, 127).reshape(*x.shape[:-1], -1, group)
    largest = jnp.maximum(groups, ~groups).max(-1, keepdims=True)
    used = 33 - lax.clz(largest)  # the sign included
    dropped = jnp.maximum(used - jnp.minimum(bits, 8)[..., None, None], 0)
    kept = ((groups >> dropped) << dropped) + ((1 << dropped) >> 1)
    return QTensor(kept.astype(jnp.int8).reshape(x.shape), scale)


def decode(vectors: QTensor) -> Float[Array, "*batch C"]:
    """The vectors that codes stand for, in the dtype of their scale."""
    return vectors.codes.astype(vectors.scale.dtype) * vectors.scale[..., None]


def encode_kv(k_BTKH: Float[Array, "B T K H"], bits_BT: Int[Array, "B T"], group: int) -> QTensor:
    """Keys or values as a cache holds them: not rotated, and a byte each whatever the bits."""
    return encode(k_BTKH, bits_BT[..., None], group)


decode_kv = decode


def recode_kv(x: Float[Array, "*batch K H"], bits: Int[Array, "*#batch"]) -> QTensor:
    """The codes of keys or values that `decode_kv` gave, from their values and bits alone.

    A cache is packed after attention has read what the codes stand for. The largest code of a
    vector is known: +-127, with the bits below b exchanged for their middle. So the step is too.
    From bfloat16, which has 8 bits itself, the largest codes may come back as their neighbours.
    """
    dropped = 8 - jnp.clip(bits, 2, 8)
    largest = ((127 >> dropped) << dropped) + ((1 << dropped) >> 1)
    exact = x.astype(exact_dtype(x.dtype))
    scale = jnp.abs(exact).max(-1) / largest[..., None]
    unit = exact / jnp.maximum(scale, jnp.finfo(exact.dtype).tiny)[..., None]
    codes = jnp.clip(jnp.round(unit), -127, 127).astype(jnp.int8)
    return QTensor(codes, scale.astype(x.dtype))


def rotate(x: Float[Array, "*batch C"]) -> Float[Array, "*batch C"]:
    """R, in blocks of the largest power of two up to `LARGEST_ROTATION` that divides C."""
    channels = x.shape[-1]
    exact = x.astype(exact_dtype(x.dtype))
    return rotate_groups(exact, min(channels & -channels, LARGEST_ROTATION))


def simulate(x: Array, bits: Array, group: int) -> Array:
    """What an int8 product makes of its input; vectors of 16 bits are untouched."""
    out = rotate(decode(encode(rotate(x), bits, group)))
    return jnp.where((bits < FULL_BITS)[..., None], out.astype(x.dtype), x)


def product(
    x: Array, bits: Array, group: int, weights: QTensor, bias_O: Array | None = None
) -> Array:
    """A projection in int8, at least float32: every token rides at its own bits."""
    vectors = encode(rotate(x), bits, group)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    dots = lax.dot_general(vectors.codes, weights.codes, dims, preferred_element_type=jnp.int32)

    def row(vector_O: Array) -> Array:
        return vector_O.astype(exact).reshape((1,) * (x.ndim - 1) + vector_O.shape)

    exact = vectors.scale.dtype
    out = dots.astype(exact) * (vectors.scale[..., None] * row(weights.scale))
    return out if bias_O is None else out + row(bias_O)


@jax.jit
def quantize_kernel(kernel: Float[Array, "*L D O"]) -> QTensor:
    """Rotated codes of a projection, of one layer or stacked, with a scale an output channel."""
    if kernel.shape[-2] > MOST_CHANNELS:
        raise ConfigError(
            f"a projection of {kernel.shape[-2]} channels could overflow int32, {MOST_CHANNELS} "
            "is the most: use amq.execution 'fake'."
        )
    if kernel.ndim > 2:  # layer by layer: the whole stack in full precision would be large
        return lax.map(quantize_kernel, kernel)
    exact = rotate(kernel.T).T
    scale = jnp.abs(exact).max(0) / 127
    unit = exact / jnp.maximum(scale, jnp.finfo(exact.dtype).tiny)[None, :]
    return QTensor(jnp.clip(jnp.round(unit), -127, 127).astype(jnp.int8), scale)


def rotate_groups(x: Float[Array, "*batch C"], group: int) -> Float[Array, "*batch C"]:
    """Orthonormal Hadamard rotation inside each group; its own inverse."""
    matrix = jnp.asarray(hadamard(group), x.dtype)
    return (x.reshape(*x.shape[:-1], -1, group) @ matrix).reshape(x.shape)


@functools.lru_cache
def hadamard(size: int) -> np.ndarray:
    """Sylvester's Hadamard matrix over sqrt(size); `size` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def quantize_weights(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the int8 codes of their projections under "int8", as int8 execution needs.

    The engines do this themselves, once for the parameters used last; call it to keep several sets,
    or to see the memory taken: one byte for each weight of the projections, beside the weights.

    Args:
      params: From `qs_jax.load`.

    Returns:
      A new dict; the arrays of `params` are shared.

    Raises:
      ConfigError: "int8" is in them already, with the shapes of other weights.
    """
    kernels = {name: part["kernel"] for name, part in params["layers"].items() if "kernel" in part}
    if "int8" in params:
        given = {name: part.codes.shape for name, part in params["int8"].items()}
        if given != {name: kernel.shape for name, kernel in kernels.items()}:
            raise ConfigError("params['int8'] is of another model: leave it out, it is made anew.")
        return params
    return {**params, "int8": _quantized(kernels, params["embed"]["tokens"].dtype)}


_last = LastMade()


def _quantized(kernels: Mapping[str, Any], dtype: Any) -> dict[str, QTensor]:
    def quantize() -> dict[str, QTensor]:
        floats = with_floats(dict(kernels), dtype)
        return {name: quantize_kernel(kernel) for name, kernel in floats.items()}

    return _last.get(jax.tree.leaves(dict(kernels)), quantize)
