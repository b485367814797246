"""An XLA profiler trace of prefill and of decoding, with the time each named scope took.

`python -m benchmarks.trace --ckpt DIR --out DIR` writes one trace a phase below `--out`, checks
that the scopes of the mechanisms that run are in it, prints the time of each, and says how to look
at it. Prefill is `generate` with one new token; decode is the rest of `stream`, a step a token.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import qs_jax
from benchmarks import components, environment
from qs_jax import presets
from qs_jax.commands.maps import find_maps
from qs_jax.engine.schedule import bind_call
from qs_jax.errors import InputError, QuickSilverError
from qs_jax.models import Params

# Steps of `stream` before the trace of decoding: the prefill, and the one that packs the caches.
WARM_STEPS = 2


@dataclasses.dataclass
class Arguments:
    """Capture profiler traces of prefill and decode, and say where the time went."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    out: Path
    """Folder for the traces; PREFILL and DECODE get one each."""
    preset: str = "paper-bits-vocab"
    """Mechanisms to run: a name, or FILE.json. The default has all four, in both phases."""
    batch_size: int = 4
    """Rows. XLA rewrites products of a single row on CPU without noting their scope: with 1 they
    count as "other"."""
    prompt: int = 256
    """Tokens of each prompt, at random."""
    new_tokens: int = 16
    """Tokens generated after it."""
    dtype: str | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""


def expected_scopes(cfg: qs_jax.Config, phase: str) -> tuple[str, ...]:
    """Scopes that a phase must show, given what runs in it.

    Args:
      cfg: The call; what `execution="auto"` leaves out is not expected.
      phase: "prefill" or "decode"; under "continuation" nothing decides about new tokens.
    """
    scopes = ["attn", "mlp", "kv_write"]
    bound = bind_call(cfg, "compact" if phase == "prefill" else "decode")
    if bound is None:
        return tuple(scopes)
    plan = bound[0]
    if phase == "prefill" or not plan.continuation:
        scopes += ["signals", "halt"] if plan.halting is not None else []
        scopes += ["fuse"] if plan.fusion is not None else []
        scopes += ["amq"] if plan.amq is not None else []
    return tuple(scopes)


def capture(
    params: Params, tokens: np.ndarray, cfg: qs_jax.Config, folder: Path
) -> dict[str, dict[str, float]]:
    """Trace both phases.

    Args:
      params: From `qs_jax.load`.
      tokens: int `[B, T]`, prompts.
      cfg: Model and mechanisms; more than two new tokens.
      folder: The traces go to "prefill" and "decode" in it.

    Returns:
      Seconds of each component, by phase.

    Raises:
      InputError: Too few new tokens.
    """
    if cfg.max_new_tokens <= WARM_STEPS:
        raise InputError(f"--new-tokens must be at least {WARM_STEPS + 1}: two come before.")
    short = cfg.replace(max_new_tokens=1)

    def begun() -> tuple[Iterator[Any]]:
        steps = qs_jax.stream(params, tokens, cfg)
        for _ in range(WARM_STEPS):
            next(steps)
        return (steps,)

    def decode(steps: Iterator[Any]) -> None:
        for number in range(WARM_STEPS, cfg.max_new_tokens):
            with jax.profiler.StepTraceAnnotation("decode", step_num=number):
                next(steps)

    return {
        "prefill": components.profile(
            lambda: qs_jax.generate(params, tokens, short), folder=folder / "prefill"
        ),
        "decode": components.profile(decode, begun, folder / "decode"),
    }


def missing_scopes(found: dict[str, dict[str, float]], cfg: qs_jax.Config) -> list[str]:
    """Expected scopes in which no operation of the trace ran, as "phase: scope"."""
    return [
        f"{phase}: {scope}"
        for phase, seconds in found.items()
        for scope in expected_scopes(cfg, phase)
        if not seconds.get(scope, 0) > 0
    ]


def table(found: dict[str, dict[str, float]], steps: int, title: str) -> Table:
    """Milliseconds and shares of each component."""
    out = Table(title=title)
    out.add_column("scope")
    out.add_column("prefill, ms", justify="right")
    out.add_column(f"decode, ms a step\n({steps} steps)", justify="right")
    per = {"prefill": 1, "decode": steps}
    totals = {phase: max(sum(seconds.values()), 1e-12) for phase, seconds in found.items()}
    for scope, label in components.COMPONENTS.items():
        if not any(scope in seconds for seconds in found.values()):
            continue
        cells = [
            f"{seconds[scope] * 1e3 / per[phase]:.3f} ({seconds[scope] / totals[phase]:.1%})"
            if scope in seconds
            else ""
            for phase, seconds in found.items()
        ]
        out.add_row(f"{scope} ({label})" if scope != label else scope, *cells)
    return out


def how_to_open(folder: Path) -> list[str]:
    """What to do with the files of the newest trace of each phase."""
    lines = []
    for phase in ("prefill", "decode"):
        newest = max((folder / phase).rglob("*.trace.json.gz"), key=lambda f: f.stat().st_mtime_ns)
        lines.append(f"{phase}: {newest}")
    return [
        *lines,
        "Perfetto: open ui.perfetto.dev and load such a .trace.json.gz (it stays in the browser); "
        "operations go by their XLA names.",
        f"xprof: pip install xprof, then xprof --logdir {folder / 'prefill'} (or decode); it reads "
        "the .xplane.pb beside it, and shows the scopes (Trace Viewer, HLO Op Profile).",
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.trace", args=argv)
    try:
        return _run(args)
    except QuickSilverError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(args: Arguments) -> int:
    params, model = qs_jax.load(args.ckpt, dtype=args.dtype)
    cfg = qs_jax.Config(
        model,
        presets.by_name(args.preset, model),
        max_new_tokens=args.new_tokens,
        eos_token_ids=(),
    )
    maps, _ = find_maps(cfg, args.ckpt, None, args.preset)
    if maps is not None:
        params["kv_maps"] = maps
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (args.batch_size, args.prompt), np.int32)
    found = capture(params, tokens, cfg, args.out)
    missing = missing_scopes(found, cfg)
    settings = {
        "preset": Path(args.preset).name,
        "dtype": model.dtype,
        "batch_size": args.batch_size,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "decode_steps": args.new_tokens - WARM_STEPS,
    }
    content = {"settings": settings, "seconds": found, "environment": environment.describe()}
    (args.out / "scopes.json").write_text(json.dumps(content, indent=2) + "\n")
    console = Console(highlight=False)
    title = f"{settings['preset']}, {args.batch_size} x {args.prompt} tokens, {model.dtype}"
    console.print(table(found, settings["decode_steps"], title))
    for line in how_to_open(args.out):
        console.print(line, markup=False, soft_wrap=True)
    if missing:
        print(f"error: scopes without an operation: {', '.join(missing)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
