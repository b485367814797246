"""What the machine can do at best: multiply matrices, and read memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil


def best_seconds(run: Callable[[], Any], times: int = 5) -> float:
    """Shortest of a few runs after a warm-up."""
    jax.block_until_ready(run())
    found = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - began)
    return min(found)


def gemm_flops(dtype: str, sizes: tuple[int, ...] = (1024, 2048, 4096)) -> dict[str, float]:
    """FLOP/s of square matrix products, by library and size."""
    product = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    found: dict[str, float] = {}
    rng = np.random.default_rng(0)
    for size in sizes:
        host = rng.standard_normal((size, size), np.float32)
        a = jnp.asarray(host, dtype)
        found[f"jax {dtype} {size}"] = 2 * size**3 / best_seconds(lambda a=a: product(a, a))
        try:
            import torch
        except ImportError:
            continue
        device = "cuda" if torch.cuda.is_available() else "cpu"
        t = torch.tensor(host, device=device, dtype=getattr(torch, dtype))

        def multiply(t=t):
            out = t @ t
            if t.is_cuda:
                torch.cuda.synchronize()
            return out.shape[0]

        found[f"torch {dtype} {size}"] = 2 * size**3 / best_seconds(multiply)
    return found


def read_bandwidth(size: int | None = None) -> dict[str, float]:
    """Bytes a second of reading an array once, on all cores or the device, by method.

    Args:
      size: Bytes of the array; by default 1 GiB, less where memory is short. It must be well above
        the caches.
    """
    size = size or int(min(2**30, psutil.virtual_memory().available // 8))
    columns = 4096
    rows = max(size // 4 // columns, 1)
    size = rows * columns * 4
    matrix = jnp.ones((rows, columns), jnp.float32)
    vector = jnp.ones((columns,), jnp.float32)
    total, gemv = jax.jit(jnp.sum), jax.jit(lambda m, v: m @ v)
    found = {
        "jax sum": size / best_seconds(lambda: total(matrix)),
        "jax matrix-vector product": size / best_seconds(lambda: gemv(matrix, vector)),
    }
    if jax.default_backend() == "cpu":
        workers = psutil.cpu_count() or 1
        parts = np.array_split(np.asarray(matrix).reshape(-1), workers)
        with ThreadPoolExecutor(workers) as pool:
            seconds = best_seconds(lambda: list(pool.map(np.sum, parts)))
        found["numpy sum, threads"] = size / seconds
    return found


class MemoryReader:
    """Reads so many bytes once, as fast as it goes: a row to be timed in turn with others."""

    def __init__(self, size: int) -> None:
        self._array = jnp.ones(max(size // 4, 1), jnp.float32)
        self._total = jax.jit(jnp.sum)

    def warm(self) -> dict[str, Any]:
        """Compile."""
        self.run()
        return {}

    def run(self) -> dict[str, float]:
        """The shortest of a few reads."""
        seconds = best_seconds(lambda: self._total(self._array), times=3)
        return {"seconds": seconds, "call_seconds": seconds}


def measure(dtype: str, quick: bool = False) -> dict[str, Any]:
    """GEMM peak and memory bandwidth, the best of what was tried, and all of it."""
    gemm = gemm_flops(dtype, (1024, 2048) if quick else (1024, 2048, 4096))
    bandwidth = read_bandwidth()
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "dtype": dtype,
        "gemm_flops": max(gemm.values()),
        "bandwidth": max(bandwidth.values()),
        "gemm_flops_all": gemm,
        "bandwidth_all": bandwidth,
    }
