"""How quantised products and keys are computed: simulated or in int8."""

from __future__ import annotations

import functools
import math
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import AMQConfig, ModelConfig
from qs_jax.errors import ConfigError
from qs_jax.mechanisms import amq, int8
from qs_jax.mechanisms.kv_maps import select
from qs_jax.mechanisms.plan import Plan
from qs_jax.models import Params, family_of, layers
from qs_jax.models.layers import Multiply, dense_product


def shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the four projections of a layer."""
    d, f = model.hidden_size, model.mlp_size
    first = family_of(model).mlp_products - 1
    name = "gate_up" if first == 2 else "up"
    return {
        "qkv": (d, model.q_size + 2 * model.kv_size),
        "out": (model.q_size, d),
        name: (d, first * f),
        "down": (f, d),
    }


def product_seconds(
    inputs: int,
    outputs: int,
    tokens: int,
    dtypes: tuple[str, ...],
    rounds: int = 7,
    seconds: float = 0.02,
) -> dict[str, float]:
    """Seconds of one product in each dtype and in int8, quantisation of the input included.

    The kinds take turns, so that a busy machine slows them alike: the median over turns of the
    fastest call in each.

    Args:
      inputs: Channels of a token.
      outputs: Channels of the result.
      tokens: Rows.
      dtypes: Of the float products.
      rounds: Turns.
      seconds: Each turn repeats a product for about this long, but at most 100 times.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, inputs)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.float32)
    bits = jnp.full(tokens, 8, jnp.int32)
    multiply = jax.jit(layers.product)
    calls: dict[str, Callable[[], Array]] = {
        dtype: functools.partial(multiply, x.astype(dtype), kernel.astype(dtype))
        for dtype in dtypes
    }
    weights = int8.quantize_kernel(kernel)
    narrow = x.astype(dtypes[0])
    group = math.gcd(inputs, 16)
    in_int8 = jax.jit(int8.product, static_argnames=("group",))
    calls["int8"] = functools.partial(in_int8, narrow, bits, group=group, weights=weights)
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        repeats[name] = max(1, min(100, round(seconds / _fastest(call, 2))))
    taken = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(_fastest(call, repeats[name]))
    return {name: float(np.median(each)) for name, each in taken.items()}


def _fastest(call: Callable[[], Array], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return min(taken)


def quantize_weights(params: Params) -> Params:
    """Parameters with the int8 codes of their projections under "int8", as int8 execution needs.

    The engines do this themselves, once for the parameters used last; call it to keep several sets,
    or to see the memory taken: one byte for each weight of the projections, beside the weights.

    Args:
      params: From `qs_jax.load`.

    Returns:
      A new dict; the arrays of `params` are shared.

    Raises:
      ConfigError: "int8" is there already, of other weights' shapes.
    """
    kernels = {name: part["kernel"] for name, part in params["layers"].items() if "kernel" in part}
    if "int8" in params:
        given = {name: part.codes.shape for name, part in params["int8"].items()}
        if given != {name: kernel.shape for name, kernel in kernels.items()}:
            raise ConfigError("params['int8'] is of another model: leave it out, it is made anew.")
        return params
    return {**params, "int8": _quantized(kernels)}


_last: dict[str, Any] = {}


def _quantized(kernels: Mapping[str, Any]) -> dict[str, int8.QTensor]:
    held = _last.get("kernels", {})
    if held.keys() == kernels.keys() and all(held[n]() is kernels[n] for n in kernels):
        return _last["weights"]
    weights = {name: int8.quantize_kernel(kernel) for name, kernel in kernels.items()}
    # Weak: the codes go when the weights they were made of go.
    forget = lambda _: _last.clear()  # noqa: E731
    _last.clear()
    _last["kernels"] = {name: weakref.ref(kernel, forget) for name, kernel in kernels.items()}
    _last["weights"] = weights
    return weights


def multiplies(plan: Plan | None) -> bool:
    """Whether products run in int8."""
    setting = plan.amq if plan is not None else None
    return setting is not None and setting.execution == "int8" and "linear" in setting.targets


def with_weights(params: Params, plan: Plan | None) -> Params:
    """Parameters as a program of this plan takes them: with what it reads and nothing more."""
    spare = {"int8", "kv_maps"}
    taken = {name: part for name, part in params.items() if name not in spare}
    if multiplies(plan):
        taken["int8"] = quantize_weights(params)["int8"]
    if plan is not None and plan.policy == "extrapolate":
        maps, rule = params["kv_maps"], plan.halting
        assert rule is not None
        assert rule.layers is not None
        taken["kv_maps"] = maps if maps.layers == rule.layers else select(maps, rule.layers)
    return taken


def simulate(
    x: Float[Array, "*batch C"], bits: Int[Array, "*batch"], setting: AMQConfig
) -> Float[Array, "*batch C"]:
    """Quantise and dequantise each vector at its own number of bits; 16 is untouched."""
    with jax.named_scope("amq"):
        if setting.execution == "fake":
            return amq.fake_quantize(x, bits, setting)
        return int8.simulate(x, bits, setting.group)


def multiplier(
    setting: AMQConfig | None,
    bits_BT: Int[Array, "B T"],
    weights: Mapping[str, int8.QTensor] | None,
    has_bits: Bool[Array, ""],
) -> Multiply:
    """How a block multiplies tokens of these bits.

    Args:
      setting: AMQ; None is off.
      bits_BT: Of each token.
      weights: Of the layer, by projection, for a product in int8; None simulates it.
      has_bits: Whether this layer quantises at all. In int8 that is a choice in each product: in
        one between whole blocks XLA would copy the cache that they write.
    """
    if setting is None or "linear" not in setting.targets:
        return dense_product

    def simulated(dense: Any, x: Array, start: int = 0) -> Array:
        return dense_product(dense, simulate(x, bits_BT, setting), start)

    def in_int8(dense: Any, x: Array, start: int = 0) -> Array:
        assert weights is not None
        with jax.named_scope("amq"):
            bias_O = dense.variables["params"].get("bias")
            columns = jax.tree.map(lambda leaf: leaf[..., start:], (weights[dense.name], bias_O))
            return lax.cond(
                has_bits,
                lambda: int8.product(x, bits_BT, setting.group, *columns),
                lambda: dense_product(dense, x, start),
            )

    return simulated if weights is None else in_int8


def kept(
    x_BTKH: Float[Array, "B T K H"], bits_BT: Int[Array, "B T"], setting: AMQConfig | None
) -> Float[Array, "B T K H"]:
    """Keys or values as they come back from the cache."""
    if setting is None or "kv" not in setting.targets:
        return x_BTKH
    with jax.named_scope("amq"):
        if setting.execution != "fake":
            cached = int8.encode_kv(x_BTKH, bits_BT, setting.group)
            found = int8.decode_kv(cached).astype(x_BTKH.dtype)
            return jnp.where((bits_BT < amq.FULL_BITS)[..., None, None], found, x_BTKH)
        bits_BTK = jnp.broadcast_to(bits_BT[..., None], x_BTKH.shape[:-1])
        return amq.fake_quantize(x_BTKH, bits_BTK, setting)
