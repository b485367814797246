"""Compiled programs on disk, so that the second start of a command compiles nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

from qs_jax.files import user_cache


def enable_compilation_cache(folder: str | None = None) -> None:
    """Keep every compiled program in a folder; to be called before the first one is compiled.

    This changes JAX's own settings, so commands and scripts call it and the library never does.
    None takes $QS_JAX_CACHE, else JAX_COMPILATION_CACHE_DIR, else qs-jax/xla in the user's cache
    folder; "off" switches the cache off.
    """
    folder = folder or os.environ.get("QS_JAX_CACHE")
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if folder is None and getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    path = Path(folder).expanduser() if folder else user_cache() / "xla"
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        print(f"compiled programs are not kept: {path} cannot be written", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # By default JAX leaves out programs that compile within a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
