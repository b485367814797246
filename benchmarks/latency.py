"""Seconds and bytes: prefill and decoding, ours dense and with mechanisms, and HF torch.

`python -m benchmarks.latency --ckpt DIR` writes benchmarks/results/latency.json group by group (a
stopped run goes on where it was). `--quick --out FILE` measures what the headline figures need, in
ten minutes.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, Literal

# torch needs memory on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp

import qs_jax
from benchmarks import environment, latency_rows, trace
from benchmarks.latency_figures import TARGETS, all_figures, headline
from benchmarks.latency_rows import READ_ROW, Group, OurCall, hugging_face, read, step_bytes
from benchmarks.timing import run_in_turn
from convert import flax_to_hf
from qs_jax.accounting import entry_bytes
from qs_jax.config import ModelConfig
from qs_jax.errors import exit_code
from qs_jax.load import find_checkpoint
from qs_jax.models import param_bytes

DTYPES = ("float32", "bfloat16")
# Filled in while a run goes on; the names are those of the JSON file.
PARTS = ("groups", "components", "components_about", "deciding", "deciding_about", "skipped")


@dataclasses.dataclass
class Arguments:
    """Time every configuration in turn with the dense model."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """A converted folder, a hub id, a Hugging Face folder or a .gguf file."""
    out: Path | None = None
    """JSON file; default benchmarks/results/latency.json, or latency_quick.json."""
    quick: bool = False
    """Only what the headline figures need."""
    batches: tuple[int, ...] = (1, 8)
    """Rows at a time."""
    lengths: tuple[int, ...] = (128, 512, 2048)
    """Tokens of a prompt."""
    presets: tuple[str, ...] = ("paper", "balanced", "small-cache")
    """Presets to measure: names, or FILE.json."""
    new_tokens: int = 64
    """Tokens a decode makes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of our rows; auto is the faster on this device. HF torch is measured in both."""
    max_minutes: float = 10.0
    """Of each group, warm-up aside: three rounds are made, and up to ten that end in time."""

    @property
    def path(self) -> Path:
        """The JSON file."""
        name = "latency_quick.json" if self.quick else "latency.json"
        return self.out or environment.RESULTS / name


class Run:
    """One run of the benchmark."""

    def __init__(self, args: Arguments, folder: Path) -> None:
        self._began = time.perf_counter()
        self.args = args
        self.params, self.model = qs_jax.load(args.ckpt, dtype=args.dtype)
        absent = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
        self._exported = None if absent else flax_to_hf.export(find_checkpoint(args.ckpt), folder)
        made_with = about(args, self.model, () if absent else ("torch", "transformers"))
        before = environment.read(args.path, made_with, {})
        self.results: dict[str, Any] = {name: before.get(name, {}) for name in PARTS}
        here = {"device": jax.devices()[0].device_kind, "processor": environment.processor()}
        self.results["machine"] = here | {"dtype": self.model.dtype}
        self.results["hf_not_measured"] = f"{absent[0]} is not installed" if absent else None
        self.results["about"] = made_with

    def measure(self) -> None:
        """Groups, then profiles; each is saved as it comes."""
        args = self.args
        given = (self.model, args.presets)
        if args.quick:
            groups = latency_rows.quick_grid(*given, args.new_tokens)
        else:
            groups = latency_rows.grid(*given, args.batches, args.lengths, args.new_tokens)
        for group in groups:
            done = self.results["groups"].get(group.key, {})
            if done.get("commit") != environment.commit():
                self.results["groups"][group.key] = self._group(group)
                self.save()
        self._profile("deciding", {name: f"{name}, decisions only" for name in args.presets})
        if not args.quick:
            self._profile("components", {f"{name}, prefill": name for name in args.presets})
        self.save()

    def save(self) -> None:
        """Write everything measured so far, the headline on top."""
        details: dict[str, dict[str, float]] = {}
        for figure in all_figures(self.results):
            details.setdefault(figure.name, {})[figure.where] = figure.value
        worst = headline(self.results).items()
        values = {name: None if figure is None else figure.value for name, figure in worst}
        content = values | self.results | {"headline_details": details}
        environment.write(self.args.path.stem, content, self.args.path)

    def _group(self, group: Group) -> dict[str, Any]:
        """Warm every row of a group up, then time them in turn."""
        args = self.args
        rows_NT = environment.random_tokens(self.model.vocab_size, group.batch, group.length)
        ours = {
            name: OurCall(self.params, rows_NT, group.section, cfg)
            for name, cfg in group.rows.items()
        }
        others: dict[str, Any] = {}
        if group.beside:
            other = DTYPES[1 - DTYPES.index(self.model.dtype)]
            params, model = qs_jax.load(args.ckpt, dtype=other)
            cfg = group.rows["dense"].replace(model=model)
            ours[f"dense, {other}"] = OurCall(params, rows_NT, group.section, cfg)
            if group.section == "decode":
                size = step_bytes(group.batch, group.length, self.results["about"])
                others[READ_ROW] = read(size)
            if self._exported is not None:
                given = (group.section, rows_NT, args.new_tokens)
                for dtype in DTYPES:
                    others[f"HF sdpa {dtype}"] = hugging_face(self._exported, dtype, *given)
        rows: dict[str, Any] = {name: call.warm() for name, call in ours.items()}
        for name, call in others.items():
            call()
            rows[name] = {}
        seconds = 60 * args.max_minutes
        if group.ends is not None:
            seconds = max(60 * group.ends - (time.perf_counter() - self._began), 0.0)
        rounds, least = (7, 2) if args.quick else (10, 3)
        calls = ours | others
        timed = run_in_turn(calls, rounds, least=least, seconds=seconds)
        rows = {name: row | timed[name] for name, row in rows.items()}
        if not args.quick:
            # Other sizes are other programs: a few groups of them use up the memory maps of Linux.
            jax.clear_caches()
            gc.collect()
        sizes = {"batch": group.batch, "length": group.length, "section": group.section}
        made = {"commit": environment.commit(), "machine": self.results["machine"]}
        return {"rows": rows} | sizes | made

    def _profile(self, part: str, names: dict[str, str]) -> None:
        """Median seconds by component of the dense prefill and others, profiled in turn."""
        args, model = self.args, self.model
        length = min(512, model.max_positions - args.new_tokens)
        rows_NT = environment.random_tokens(model.vocab_size, 4, length)
        cfgs = latency_rows.rows("prefill", model, args.presets, args.new_tokens)
        names = {"dense" if part == "deciding" else "dense prefill": "dense"} | names
        names = {name: row for name, row in names.items() if row in cfgs}
        profiles: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        count = 1 if args.quick else 3
        for name in [*names] * count:
            cfg = cfgs[names[name]]
            seconds = trace.profile(lambda cfg=cfg: qs_jax.generate(self.params, rows_NT, cfg))
            profiles[name].append(seconds)
        self.results[part] = {
            name: {scope: median(run.get(scope, 0.0) for run in runs) for scope in trace.COMPONENTS}
            for name, runs in profiles.items()
        }
        sizes = {"batch": 4, "length": length, "runs": count}
        self.results[f"{part}_about"] = sizes | {"commit": environment.commit()}


def about(args: Arguments, model: ModelConfig, packages: tuple[str, ...]) -> dict[str, Any]:
    """What decides a measurement besides the commit."""
    embedding = model.vocab_size * model.hidden_size * jnp.dtype(model.dtype).itemsize
    return {
        "model": environment.source_of(args.ckpt),
        "dtype": model.dtype,
        "text": "random token ids",
        "new_tokens": args.new_tokens,
        # A decoding step reads a row or so of an untied embedding.
        "weight_bytes": param_bytes(model) - (0 if model.tie_embeddings else embedding),
        "kv_bytes_per_token": model.num_layers * float(entry_bytes(model)[16]),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def run(args: Arguments) -> None:
    """Measure, and print the headline."""
    with tempfile.TemporaryDirectory() as folder:
        Run(args, Path(folder) / "hf").measure()
    results = json.loads(args.path.read_text(encoding="utf-8"))
    for name, (sign, target, text) in TARGETS.items():
        value = results.get(name)
        shown = "not measured" if value is None else f"{value:.3f}"
        print(f"{name:28} {shown:>12}   target {sign} {target:g}   {text}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    environment.run_command("latency", Arguments, run, argv)


if __name__ == "__main__":
    sys.exit(exit_code(main))
