"""What an int8 projection takes, beside float32 and bfloat16, on this device.

`python -m benchmarks.int8 --ckpt DIR` times the projections of a model into
benchmarks/results/int8.json. The int8 time includes quantising the input. Weights are random.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import environment
from benchmarks.timing import run_in_turn
from qs_jax.checkpoint import read_manifest
from qs_jax.config import ModelConfig
from qs_jax.errors import exit_code
from qs_jax.load import find_checkpoint
from qs_jax.mechanisms import int8
from qs_jax.models import family_of, layers

TOKENS = (1, 128, 2048)
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
class Arguments:
    """Time the projections of a model."""

    ckpt: Path
    """A checkpoint, as `qs_jax.load` takes it; only its sizes are read."""
    out: Path = environment.RESULTS / "int8.json"
    """JSON file."""


def shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the four projections of a layer."""
    d, f = model.hidden_size, model.mlp_size
    up = family_of(model).mlp_products - 1
    first = {"gate_up" if up == 2 else "up": (d, up * f)}
    sizes = {"qkv": (d, model.q_size + 2 * model.kv_size), "out": (model.q_size, d)}
    return sizes | first | {"down": (f, d)}


def product_seconds(inputs: int, outputs: int, tokens: int) -> dict[str, float]:
    """Seconds of a product in each dtype and in int8, the input's quantisation included."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((tokens, inputs)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((inputs, outputs)), jnp.float32)
    multiply, bits = jax.jit(layers.product), jnp.full(tokens, 8, jnp.int32)
    calls: dict[str, Callable[[], Any]] = {
        dtype: functools.partial(multiply, x.astype(dtype), kernel.astype(dtype))
        for dtype in DTYPES
    }
    in_int8 = jax.jit(int8.product, static_argnames=("group",))
    codes, group = int8.quantize_kernel(kernel), math.gcd(inputs, 16)
    narrow = x.astype(DTYPES[0])
    calls["int8"] = functools.partial(in_int8, narrow, bits, group=group, weights=codes)

    def fastest(call: Callable[[], Any]) -> dict[str, float]:
        run = lambda: jax.block_until_ready(call())  # noqa: E731
        return {"seconds": min(timeit.repeat(run, number=1, repeat=20))}

    measures = {name: functools.partial(fastest, call) for name, call in calls.items()}
    for measure in measures.values():
        measure()
    runs = run_in_turn(measures, 9, baseline="int8")
    return {name: run["seconds"] for name, run in runs.items()}


def rows(model: ModelConfig) -> list[dict[str, Any]]:
    """Seconds of each projection, and of all four, the kinds taking turns after a warm-up.

    "int8_gain" is the seconds of a float kind over those of int8: above 1, int8 is faster.
    """
    found = []
    for count in TOKENS:
        every = shapes(model).items()
        taken = {name: product_seconds(*sizes, count) for name, sizes in every}
        kinds = (*DTYPES, "int8")
        total = {kind: sum(seconds[kind] for seconds in taken.values()) for kind in kinds}
        for name, seconds in (taken | {"all four": total}).items():
            gain = {kind: seconds[kind] / seconds["int8"] for kind in DTYPES}
            about = {"projection": name, "tokens": count}
            found.append(about | {"seconds": seconds, "int8_gain": gain})
    return found


def measure(args: Arguments) -> None:
    """Write the file."""
    environment.check_out(args.out)
    manifest = read_manifest(find_checkpoint(args.ckpt))
    result = {"model": manifest["source"], "device": jax.devices()[0].device_kind}
    result["rows"] = rows(ModelConfig.from_dict(manifest["model"]))
    environment.write("int8", result, args.out)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("int8", Arguments, measure, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
