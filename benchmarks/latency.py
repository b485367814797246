"""Seconds and bytes: prefill, scoring and decoding, ours dense and with mechanisms, and HF torch.

`python -m benchmarks.latency --ckpt DIR` writes benchmarks/results/latency.json group by group (a
stopped run goes on where it was) and rewrites the tables of benchmarks/README.md. `--quick --out
FILE` measures what the headline figures need, in minutes.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

# torch needs memory on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import tyro

import qs_jax
from benchmarks import (
    environment,
    latency_cases,
    latency_components,
    latency_headline,
    latency_hf,
    latency_runs,
    latency_tables,
    machine,
)
from benchmarks.latency_cases import Group
from benchmarks.mechanism_tables import replace
from qs_jax.accounting import flops, memory
from qs_jax.checkpoint import read_manifest
from qs_jax.config import ModelConfig
from qs_jax.models import Params, count_params, param_bytes

Section = Literal["prefill", "scoring", "decode", "components", "hf"]
# Share of the measured GEMM peak that a forward pass is assumed to reach, to foretell its time.
ASSUMED = 0.6
# So many rounds of a group are made when its time is up, of a quick run QUICK_LEAST.
LEAST_ROUNDS = 3
QUICK_LEAST = 2
# Tokens from which on the dtype of Hugging Face's rows is chosen on fewer, and new ones for that.
PROBED = 4096
PROBED_NEW = 16


@dataclasses.dataclass
class Arguments:
    """Time every configuration, and say what the machine could do at best."""

    ckpt: Path = Path("ckpt/smollm2-135m")
    """Folder written by convert.hf_to_flax."""
    out: Path | None = None
    """JSON file; default benchmarks/results/latency.json, or latency_quick.json."""
    quick: bool = False
    """Only what the headline figures need."""
    only: tuple[Section, ...] = ("prefill", "decode", "scoring", "components", "hf")
    """Parts to measure; hf adds Hugging Face rows to the others."""
    batches: tuple[int, ...] = (1, 8)
    """Rows at a time."""
    lengths: tuple[int, ...] = (128, 512, 1024, 2048, 4096)
    """Tokens of a prompt."""
    presets: tuple[str, ...] = latency_cases.SHIPPED
    """Presets to measure: names, or FILE.json."""
    new_tokens: int = 64
    """Tokens a decode makes."""
    runs: int | None = None
    """Runs of each row after warm-up; default 10, quick at most 7."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of our rows; auto is the faster on this device. HF torch is measured in both."""
    text: Path | None = None
    """UTF-8 text to take the tokens from; random token ids without."""
    max_minutes: float = 10.0
    """Of each group, warm-up aside: no round that would end later is made, and where three would
    take longer the group is left out."""
    all: bool = False
    """Leave nothing out, and make every run."""
    missing: bool = False
    """Only sizes that the JSON file does not have, whatever commit measured the others."""
    fresh: bool = False
    """Measure anew what this commit has measured already."""
    tables_only: bool = False
    """Rewrite the tables from the JSON file, measure nothing."""
    page: Path = Path("benchmarks/README.md")
    """Page whose tables are rewritten; a quick run rewrites none."""

    @property
    def path(self) -> Path:
        """The JSON file."""
        name = "latency_quick.json" if self.quick else "latency.json"
        return self.out or environment.RESULTS / name

    @property
    def rounds(self) -> int:
        """Runs of each row."""
        return self.runs or (7 if self.quick else 10)


class Run:
    """One run of the benchmark: what is measured, with what, and what has been found so far."""

    def __init__(self, args: Arguments, params: Params, model: ModelConfig, began: float) -> None:
        self.args, self.params, self.model, self._began = args, params, model, began
        self.about = about(args, model)
        self.results = start(args.path, self.about, fresh=args.fresh)
        self._hf: latency_hf.HuggingFace | None = None
        self._other: tuple[Params, ModelConfig] | None = None

    def save(self) -> None:
        """Write everything found so far, the headline on top."""
        self.about["peak_rss_bytes"] = peak_rss()
        self.results["about"] = self.about
        found = {**latency_headline.headline(self.results), **self.results}
        found["headline_details"] = latency_headline.details(self.results)
        environment.write(self.args.path.stem, found, self.args.path)

    def measure(self, folder: Path) -> None:
        """Machine, groups, components, in that order; each is saved as it comes."""
        args = self.args
        found = machine.measure(self.model.dtype, quick=args.quick)
        self.results["machine"] = found | {"processor": environment.processor()}
        why = latency_hf.unavailable() if "hf" in args.only else "left out by --only"
        self.results["hf_not_measured"] = why
        if why is None:
            self._hf = latency_hf.HuggingFace(args.ckpt, folder)
        self.save()
        for group in self.groups():
            self._group(group)
        if "components" in args.only:
            self._components()
        self.save()

    def groups(self) -> list[Group]:
        """The groups of this run that are asked for."""
        args = self.args
        if args.quick:
            found = latency_cases.quick_grid(self.model, args.presets, args.new_tokens)
        else:
            found = latency_cases.grid(
                self.model, args.presets, args.batches, args.lengths, args.new_tokens
            )
        return [group for group in found if group.section in args.only]

    def _group(self, group: Group) -> None:
        settings = {
            "cases": [case.name for case in group.cases],
            "hf": group.hf and self._hf is not None,
            "rounds": self.args.rounds,
        }
        done = self.results["groups"].get(group.key)
        kept = self.args.missing or is_current(done, settings, environment.commit())
        if done is not None and kept and not self.args.fresh:
            return
        new_tokens = {"prefill": 1, "decode": self.args.new_tokens}.get(group.section, 0)
        if group.length + new_tokens > self.model.max_positions:
            reason = f"the model has {self.model.max_positions} positions"
            self.results["skipped"][group.key] = reason
            return
        minutes = self.foretell(group)
        if minutes > self.args.max_minutes and not (self.args.all or self.args.quick):
            reason = f"{LEAST_ROUNDS} rounds would take about {minutes:.0f} minutes here"
            self.results["skipped"][group.key] = reason
            self.save()
            return
        self.results["skipped"].pop(group.key, None)
        rows_NT = tokens(self.args, self.model, group.batch, group.length)
        found = latency_runs.measure(
            group,
            self.params,
            rows_NT,
            self.args.rounds,
            lambda: (
                ({} if group.long else self._other_dtype(group, rows_NT))
                | self._reader(group)
                | self._hf_runners(group, rows_NT)
            ),
            least=QUICK_LEAST if self.args.quick else LEAST_ROUNDS,
            seconds=lambda: self._seconds(group),
        )
        peak = {
            name: self.results["machine"][name] for name in ("gemm_flops", "bandwidth", "processor")
        }
        about_group = {"settings": settings, "commit": environment.commit(), "machine": peak}
        self.results["groups"][group.key] = found | about_group
        if group.section == "decode" and group.long:
            key = latency_cases.key_of("prefill", group.batch, group.length)
            self.results["groups"][key] = latency_runs.prefill_of(found) | about_group
            self.results["skipped"].pop(key, None)
        self.save()
        if not self.args.quick:  # few groups, and the last of its profiles runs their programs
            self._forget_programs()

    def _seconds(self, group: Group) -> float | None:
        """Seconds from now on for the rounds of a group; None is no limit."""
        if group.ends is not None:
            return max(60 * group.ends - (time.perf_counter() - self._began), 0.0)
        return None if self.args.all else 60 * self.args.max_minutes

    @staticmethod
    def _forget_programs() -> None:
        """Other sizes are other programs: a few groups of them use up the memory maps of Linux."""
        jax.clear_caches()
        gc.collect()

    def _other_dtype(self, group: Group, rows_NT: np.ndarray) -> dict[str, Any]:
        """The dense model in the dtype that the other rows are not in."""
        if self._other is None:
            other = {"float32": "bfloat16"}.get(self.model.dtype, "float32")
            self._other = qs_jax.load(self.args.ckpt, dtype=other)
        params, model = self._other
        case = group.cases[0]
        renamed = dataclasses.replace(
            case, name=latency_headline.dense_name(model.dtype), cfg=case.cfg.replace(model=model)
        )
        runner = latency_runs.OurRunner(params, rows_NT, group.section, renamed)
        return {renamed.name: runner}

    def _reader(self, group: Group) -> dict[str, Any]:
        if group.section != "decode":
            return {}
        size = latency_headline.step_bytes(group.batch, group.length, self.about)
        return {latency_headline.READ_ROW: machine.MemoryReader(size)}

    def _hf_runners(self, group: Group, rows_NT: np.ndarray) -> dict[str, Any]:
        if self._hf is None or not group.hf:
            return {}
        models, section = self._hf, group.section
        reasons = {
            attention: latency_hf.left_out(section, attention, rows_NT.shape, self.model.vocab_size)
            for attention in latency_hf.ATTENTION
        }

        def runners(rows_NT: np.ndarray, new_tokens: int) -> dict[str, Any]:
            return {
                latency_hf.name_of(*setting): models.runner(section, rows_NT, new_tokens, setting)
                for setting in latency_hf.SETTINGS
                if reasons[setting[0]] is None
            }

        # The better of two short runs tells which is faster; only that one is timed further.
        tried = probe(section, rows_NT), min(PROBED_NEW, self.args.new_tokens)
        seconds = {
            name: min(runner.run()["seconds"] for _ in range(2))
            for name, runner in runners(*tried).items()
        }
        names = latency_hf.faster_dtype(seconds)
        if self.args.quick:
            names = names[:1]
        all_runners = runners(rows_NT, self.args.new_tokens)
        left_out = {
            f"HF {attention}": latency_hf.LeftOut(reason)
            for attention, reason in reasons.items()
            if reason is not None
        }
        return {name: all_runners[name] for name in names} | left_out

    def foretell(self, group: Group) -> float:
        """Minutes the fewest rounds should take, from a group's FLOPs or a decode's bytes."""
        model, peak = self.model, self.results["machine"]
        tokens, length = group.batch * group.length, group.length
        layer = flops.linear_flops(model) + length / 2 * flops.key_flops(model)
        readouts = tokens if group.section == "scoring" else group.batch
        work = tokens * model.num_layers * layer + readouts * flops.head_flops(model)
        seconds = work / peak["gemm_flops"] / ASSUMED
        if group.section == "decode":
            steps = self.args.new_tokens / ASSUMED * self.about["weight_bytes"]
            seconds += steps / peak["bandwidth"]
        rows = 1 + len(group.cases) + (len(latency_hf.ATTENTION) if self._hf is not None else 0)
        runs = rows + rows // 2  # the baseline's between every two
        return seconds * runs * LEAST_ROUNDS / 60

    def _components(self) -> None:
        """Where the time of dense and of other prefills goes; a quick run wants the decisions'."""
        rows_NT = tokens(self.args, self.model, 4, min(512, self.model.max_positions - 64))
        batch, length = rows_NT.shape
        profiles = 1 if self.args.quick else latency_components.PROFILES
        sizes = {"batch": batch, "length": length, "runs": profiles}
        made_with = sizes | {"commit": environment.commit()}
        given = (self.params, self.model, rows_NT, self.args.presets, profiles)
        self.results["deciding"] = latency_components.deciding(*given)
        self.results["deciding_about"] = made_with
        if not self.args.quick:
            self.results["components"] = latency_components.components_of_calls(*given)
            self.results["components_about"] = made_with


def probe(section: str, rows_NT: np.ndarray) -> np.ndarray:
    """Tokens enough to tell which dtype is faster: of many, one row, or short prompts to decode."""
    if rows_NT.size < PROBED:
        return rows_NT
    return rows_NT[:, :128] if section == "decode" else rows_NT[:1]


def about(args: Arguments, model: ModelConfig) -> dict[str, Any]:
    """What decides a measurement besides the commit."""
    names = ("torch", "transformers") if latency_hf.unavailable() is None else ()
    manifest = read_manifest(args.ckpt)
    return {
        "model": manifest["source"],
        "parameters": count_params(model),
        "dtype": model.dtype,
        "text": f"tokens of {args.text.name}" if args.text else "random token ids",
        "new_tokens": args.new_tokens,
        "weight_bytes": weight_bytes(model),
        "kv_bytes_per_token": model.num_layers * float(memory.entry_bytes(model)[16]),
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def weight_bytes(model: ModelConfig) -> int:
    """Bytes of weights that a decoding step reads; of an untied embedding, a row or so."""
    embedding = model.vocab_size * model.hidden_size * jnp.dtype(model.dtype).itemsize
    return param_bytes(model) - (0 if model.tie_embeddings else embedding)


def start(path: Path, about: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
    """Results found before by the same kind of run, or none."""
    names = (
        "groups",
        "components",
        "components_about",
        "deciding",
        "deciding_about",
        "skipped",
    )
    empty: dict[str, Any] = {name: {} for name in names}
    if fresh or not path.exists():
        return empty
    content = json.loads(path.read_text(encoding="utf-8"))
    before = {name: value for name, value in content["about"].items() if name != "peak_rss_bytes"}
    if before != about:
        raise SystemExit(f"{path} holds other measurements ({before}): move it, or give --fresh.")
    return {name: content.get(name, value) for name, value in empty.items()}


def is_current(done: dict[str, Any] | None, settings: dict[str, Any], commit: str | None) -> bool:
    """Whether a group was measured by this commit with these settings."""
    return done is not None and (done["settings"], done["commit"]) == (settings, commit)


def tokens(args: Arguments, model: ModelConfig, batch: int, length: int) -> np.ndarray:
    """Token ids `[batch, length]`: of the text, again from its start where it ends, or random."""
    if args.text is None:
        rng = np.random.default_rng(0)
        return rng.integers(0, model.vocab_size, (batch, length), dtype=np.int32)
    text = args.text.read_text(encoding="utf-8")
    ids = qs_jax.load_tokenizer(args.ckpt)(text, verbose=False).input_ids
    return np.resize(np.asarray(ids, np.int32), (batch, length))


def peak_rss() -> int:
    """Most resident memory this process has had, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        return psutil.Process().memory_info().rss
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def write_tables(path: Path, page: Path) -> None:
    """Rewrite a page's tables from a result file."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, table in latency_tables.render(results):
        replace(page, name, table)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.latency", args=argv)
    began = time.perf_counter()
    if not args.tables_only:
        params, model = qs_jax.load(args.ckpt, dtype=args.dtype)
        with tempfile.TemporaryDirectory() as folder:
            Run(args, params, model, began).measure(Path(folder) / "hf")
    if not args.quick:
        write_tables(args.path, args.page)
    results = json.loads(args.path.read_text(encoding="utf-8")) if args.path.exists() else {}
    for name, (sign, target, text) in latency_headline.TARGETS.items():
        value = results.get(name)
        shown = "not measured" if value is None else f"{value:.3f}"
        print(f"{name:28} {shown:>12}   target {sign} {target:g}   {text}")
    print(f"{args.path}, {(time.perf_counter() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
