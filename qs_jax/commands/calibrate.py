"""`python -m qs_jax calibrate`: the preset that saves most within a quality budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from qs_jax.calibration import Calibration, search
from qs_jax.calibration.families import halting_layers
from qs_jax.calibration.fit_maps import fit_kv_maps
from qs_jax.calibration.search import result_files
from qs_jax.checkpoint import load_tokenizer
from qs_jax.commands.options import FileOptions, print_table
from qs_jax.config import Config
from qs_jax.errors import InputError
from qs_jax.evaluation.perplexity import read_windows
from qs_jax.mechanisms.kv_maps import FEATURES, PROMPT_FEATURES, KVMaps, feature_count
from qs_jax.models import Params


@dataclasses.dataclass(kw_only=True)
class Calibrate(FileOptions):
    """Find the preset that saves most within a quality budget, and check it on other text."""

    preset: tyro.conf.Suppress[str] = "off"
    data: str
    """wikitext-103, c4, or a file: .jsonl, .jsonl.gz, .json.gz (field "text"), or plain text."""
    max_ppl_increase: float
    """The budget: perplexity above the dense model's, bounded with --confidence."""
    out: Path
    """The preset, as JSON; the measurements and the maps it reads are written beside it."""
    protocol: Literal["teacher-forced", "continuation"] = "continuation"
    """continuation: mechanisms act on prompts; teacher-forced: on every token."""
    objective: Literal["exact_flops", "paper_flops", "layer_tokens"] = "exact_flops"
    """Cost to reduce."""
    windows: int = 16
    """Windows to search on."""
    verify_windows: int = 32
    """Windows after those, to verify on: the more, the closer the bound."""
    fit_windows: int = 64
    """Windows after those, to fit the maps of the "extrapolate" policy on; 0 takes those beside the
    checkpoint, if there are any. Nothing is fitted with --kv-maps."""
    seq_len: int = 512
    """Tokens of each window."""
    continuation_tokens: int = 128
    """Under continuation: the last tokens of each window, which are scored."""
    batch_size: int = 4
    """Windows at a time."""
    confidence: float = 0.95
    """Of the bound that must stay within the budget."""
    layers: tuple[int, ...] | None = None
    """Layers at which tokens may halt; eight from 0.4 of the depth on by default."""
    also: tuple[Path, ...] = ()
    """Other texts, on the first --verify-windows windows of which the preset must stay within the
    budget too."""
    fit_data: tuple[Path, ...] = ()
    """More text to fit the maps on, whole: files as for --data."""
    features: tuple[Literal["state", "embedding", "previous", "neurons"], ...] | None = None
    """Inputs of the maps (docs/mechanisms.md); by default everything that the protocol allows."""
    rank: int = 256
    """Numbers of the code that the maps of all deeper layers share; 0, or a model with no more
    features than that, reads the features."""
    policies: tuple[Literal["skip", "propagate", "extrapolate"], ...] | None = None
    """KV policies to try; by default skip, and extrapolate where maps are fitted."""
    max_evaluations: int = 60
    """Candidates measured for each KV policy."""
    candidates: int = 4
    """Candidates of the front to verify."""
    timed_runs: int = 3
    """Runs of the winner and of the dense model, in turn, for the measured time; 0 for none."""

    def targets(self) -> list[tuple[str, Path]]:
        """The preset, and what is written beside it."""
        return [("--out", path) for path in result_files(self.out)]

    def run(self) -> None:
        """Check, search, write, report."""
        self.check_out()
        if min(self.windows, self.verify_windows) < 2 or self.fit_windows < 0:
            least = "--windows and --verify-windows must be at least 2"
            raise InputError(f"{least}, and --fit-windows must be at least 0.")
        needed = self.windows + self.verify_windows
        tokenizer = load_tokenizer(self.ckpt)
        text, cut = read_windows(self.data, tokenizer, self.seq_len, needed + self.fit_windows)
        whole = min(len(cut.tokens_WT), cut.tokens_in_text // self.seq_len)
        if whole < needed + self.fit_windows:
            asked = f"{self.windows} + {self.verify_windows} + {self.fit_windows} were asked for"
            raise InputError(f"{text.name} has {whole} windows of {self.seq_len} tokens; {asked}.")
        also = {}
        for path in self.also:
            other, more = read_windows(str(path), tokenizer, self.seq_len, self.verify_windows)
            also[other.name] = more.tokens_WT
        cfg = self.config(continuation_tokens=self.continuation_tokens)
        params = self._with_maps(cut.tokens_WT[needed:], cfg, text.name, tokenizer)
        names = "max_ppl_increase objective confidence policies layers max_evaluations candidates"
        names += " batch_size timed_runs"
        settings = {name: getattr(self, name) for name in names.split()}
        settings |= {"also": also, "data": text.name, "progress": True}
        settings["verify_share"] = self.verify_windows / needed
        calibration = search(params, cut.tokens_WT[:needed], cfg, **settings)
        files = calibration.save(self.out, cfg.model)
        self._print(calibration)
        for path in files:
            print(f"wrote {path}")

    def _with_maps(self, fitting_WT: Any, cfg: Config, data: str, tokenizer: Any) -> Params:
        """The parameters, with maps read from a file or fitted on windows of --data and more."""
        if self.kv_maps is not None or not self.fit_windows:
            return self.load(self.kv_maps and KVMaps.load(self.kv_maps))
        for path in self.fit_data:
            text, more = read_windows(str(path), tokenizer, self.seq_len, None)
            fitting_WT = np.concatenate([fitting_WT, more.tokens_WT])
            data = f"{data}, {text.name}"
        barred = () if self.protocol == "continuation" else PROMPT_FEATURES
        features = self.features or tuple(name for name in FEATURES if name not in barred)
        params, layers = self.load(), self.layers or halting_layers(cfg.model)
        rank = self.rank if 0 < self.rank < feature_count(features, cfg.model) else None
        settings: dict[str, Any] = {"features": features, "rank": rank, "data": data}
        # Sums of products as large as the maps' are slow to add up: larger batches, fewer sums.
        settings |= {"batch_size": 4 * self.batch_size, "progress": True}
        maps = fit_kv_maps(params, fitting_WT, layers, cfg.model, **settings)
        return {**params, "kv_maps": maps}

    def _print(self, calibration: Calibration) -> None:
        """Print the measurements on the verification windows."""
        columns = "KV policy, perplexity, bound, exact FLOPs, paper FLOPs, in budget".split(", ")
        rows = []
        for entry in calibration.verified:
            bound = entry["upper_bound"]
            row = [entry["family"], f"{entry['ppl_increase']:+.3f}"]
            row += ["none" if bound is None else f"{bound:+.3f}"]
            row += [f"{entry[f'{count}_flops_saved']:.1%}" for count in ("exact", "paper")]
            rows.append([*row, "yes" if entry["within_budget"] else "no"])
        print_table("candidates on the verification windows", columns, rows)
        verified = calibration.preset.provenance["verified"]
        if calibration.preset.is_off:
            print(verified["reason"])
        elif verified["measured_time_saved"] is not None:
            print(f"time saved here, measured: {verified['measured_time_saved']:.1%}")
