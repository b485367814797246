"""JAX around this library: the settings that programs run under, and its errors in words."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def default_settings() -> Iterator[None]:
    """Run a block or a decorated function under the settings that programs are written for.

    They mix dtypes, take host arrays, and hold NaN and infinity on purpose: in records where
    nothing was measured, in ranks and in filters. So JAX's debug modes do not apply inside; the
    engines check results themselves.
    """
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.numpy_dtype_promotion("standard"),
        jax.transfer_guard("allow"),
    ):
        yield


def explain(error: Exception) -> str | None:
    """What a user can do about an error of JAX or of memory; None for any other error."""
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason:
        return (
            f"out of memory ({reason}): lower the batch size or the sequence length, take bfloat16,"
            " or a device with more memory."
        )
    try:
        jax.devices()
    except Exception:  # which kind differs between platforms
        names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES")
        given = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        return (
            f"JAX finds no device of the platform that it was told to use ({given or reason}): "
            "leave it out, take JAX_PLATFORMS=cpu, or install JAX for that platform."
        )
    return f"JAX failed: {reason}" if isinstance(error, jax.errors.JaxRuntimeError) else None
