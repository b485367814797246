"""Long calls, several times over: do they finish, and does memory stay where it was?

`python -m benchmarks.long_runs --ckpt DIR` runs a 4,096-token prompt with 1,024 new tokens and a
batch of 16 ragged rows, dense and under a preset, and notes the process's memory and the live
arrays after every call.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
import tyro
from tqdm import tqdm

import qs_jax
from benchmarks import environment
from qs_jax import presets


@dataclasses.dataclass
class Arguments:
    """Run long calls again and again and watch the memory."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """Folder written by convert.hf_to_flax."""
    out: Path | None = None
    """JSON file; default benchmarks/results/long_runs.json."""
    prompt: int = 4096
    """Tokens of the long prompt."""
    new_tokens: int = 1024
    """Tokens generated after it."""
    rows: int = 16
    """Ragged rows of the batch, 16 to 512 tokens each."""
    presets: tuple[str, ...] = ("off", "balanced")
    """Mechanisms to run under."""
    times: int = 3
    """Calls of each kind."""


def rows_of(model: qs_jax.ModelConfig, lengths: list[int]) -> list[list[int]]:
    """Random token ids of these lengths."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, model.vocab_size, length).tolist() for length in lengths]


def call(params: Any, tokens: list[list[int]], cfg: qs_jax.Config) -> dict[str, Any]:
    """One call, and what is in memory after it."""
    began = time.perf_counter()
    out = qs_jax.generate(params, tokens, cfg)
    seconds = time.perf_counter() - began
    lengths = out.lengths.tolist()
    assert lengths == [cfg.max_new_tokens] * len(tokens)
    kv_bytes = out.kv_bytes
    del out
    gc.collect()
    live = jax.live_arrays()
    return {
        "seconds": seconds,
        "resident_bytes": psutil.Process().memory_info().rss,
        "live_arrays": len(live),
        "live_bytes": sum(array.nbytes for array in live),
        "kv_bytes": kv_bytes,
    }


def main(argv: list[str] | None = None) -> None:
    """Run every kind of call and write what was seen."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.long_runs", args=argv)
    params, model = qs_jax.load(args.ckpt)
    ragged = np.linspace(16, 512, args.rows).astype(int).tolist()
    kinds = {
        f"1 x {args.prompt}, {args.new_tokens} new tokens": ([args.prompt], args.new_tokens),
        f"{args.rows} ragged rows of 16 to 512, 64 new tokens": (ragged, 64),
    }
    result: dict[str, Any] = {"ckpt": args.ckpt.name, "dtype": model.dtype, "calls": {}}
    for name in args.presets:
        for kind, (lengths, count) in kinds.items():
            tokens = rows_of(model, lengths)
            cfg = qs_jax.Config(
                model, presets.by_name(name, model), max_new_tokens=count, eos_token_ids=()
            )
            label = f"{name}, {kind}"
            result["calls"][label] = [
                call(params, tokens, cfg) for _ in tqdm(range(args.times), label)
            ]
            environment.write("long_runs", result, args.out)
    for label, calls in result["calls"].items():
        grown = calls[-1]["resident_bytes"] - calls[0]["resident_bytes"]
        times = ", ".join(f"{each['seconds']:.1f}" for each in calls)
        same = calls[-1]["live_bytes"] == calls[0]["live_bytes"]
        print(
            f"{label}: {times} s; resident memory "
            f"{grown / 1e6:+.0f} MB from first to last call; live arrays "
            f"{'the same' if same else 'grew'}"
        )


if __name__ == "__main__":
    main()
