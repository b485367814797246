"""`python -m qs_jax calibrate`: the preset that saves most within a quality budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from pydantic import Field

from qs_jax.calibration import Calibration, search
from qs_jax.calibration.families import halting_layers
from qs_jax.calibration.fit_maps import check_fit, fit_kv_maps
from qs_jax.calibration.search import result_files
from qs_jax.checkpoint import load_tokenizer
from qs_jax.commands.options import FileOptions, print_table
from qs_jax.config import ModelConfig
from qs_jax.config.fields import Above0, Count, Positive, Several, Share
from qs_jax.errors import InputError
from qs_jax.evaluation.perplexity import check_width, read_windows
from qs_jax.mechanisms.kv_maps import FEATURES, PROMPT_FEATURES, KVMaps, feature_count


@dataclasses.dataclass(kw_only=True)
class Calibrate(FileOptions):
    """Find the preset that saves most within a quality budget, and check it on other text."""

    preset: tyro.conf.Suppress[str] = "off"
    data: str
    """wikitext-103, c4, or a file: .jsonl or .json (field "text"), or plain text; .gz too."""
    max_ppl_increase: Above0
    """The budget: perplexity above the dense model's, bounded with --confidence."""
    out: Path
    """The preset, as JSON; the measurements and the maps it reads are written beside it."""
    protocol: Literal["teacher-forced", "continuation"] = "continuation"
    """continuation: mechanisms act on prompts; teacher-forced: on every token."""
    objective: Literal["exact_flops", "paper_flops", "layer_tokens"] = "exact_flops"
    """Cost to reduce."""
    windows: Several = 16
    """Windows to search on."""
    verify_windows: Several = 32
    """Windows after those, to verify on: the more, the closer the bound."""
    fit_windows: Count = 64
    """Windows after those, to fit the maps of the "extrapolate" policy on; 0 takes those beside the
    checkpoint, if there are any. Nothing is fitted with --kv-maps."""
    seq_len: Several = 512
    """Tokens of each window."""
    continuation_tokens: Positive = 128
    """Under continuation: the last tokens of each window, which are scored."""
    batch_size: Positive = 4
    """Windows at a time."""
    confidence: Share = 0.95
    """Of the bound that must stay within the budget."""
    layers: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """Layers at which tokens may halt; eight from 0.4 of the depth on by default."""
    also: tuple[str, ...] = ()
    """Other texts, on the first --verify-windows windows of which the preset must stay within the
    budget too."""
    fit_data: tuple[str, ...] = ()
    """More text to fit the maps on, whole: files as for --data."""
    features: tuple[Literal["state", "embedding", "previous", "neurons"], ...] | None = None
    """Inputs of the maps (docs/mechanisms.md); by default everything that the protocol allows."""
    rank: Count = 256
    """Numbers of the code that the maps of all deeper layers share; 0, or a model with no more
    features than that, reads the features."""
    policies: tuple[Literal["skip", "propagate", "extrapolate"], ...] | None = None
    """KV policies to try; by default skip, and extrapolate where maps are fitted."""
    max_evaluations: Positive = 60
    """Candidates measured for each KV policy."""
    candidates: Positive = 4
    """Candidates of the front to verify."""
    timed_runs: Count = 3
    """Runs of the winner and of the dense model, in turn, for the measured time; 0 for none."""

    def targets(self) -> list[tuple[str, Path]]:
        """The preset, and what is written beside it."""
        return [("--out", path) for path in result_files(self.out)]

    def run(self) -> None:
        """Check, search, write, report."""
        self.check_out()
        cfg = self.config(continuation_tokens=self.continuation_tokens)
        check_width(self.seq_len, cfg)
        fit = self._fit_settings(cfg.model)
        maps = self.kv_maps and KVMaps.load(self.kv_maps)
        if maps is not None:
            maps.check(cfg.model)
        needed = self.windows + self.verify_windows
        tokenizer = load_tokenizer(self.ckpt)
        text, cut = read_windows(self.data, tokenizer, self.seq_len, needed + self.fit_windows)
        whole = min(len(cut.tokens_WT), cut.tokens_in_text // self.seq_len)
        if whole < needed + self.fit_windows:
            asked = f"{self.windows} + {self.verify_windows} + {self.fit_windows} were asked for"
            raise InputError(f"{text.name} has {whole} windows of {self.seq_len} tokens; {asked}.")
        also = self._read_more(self.also, tokenizer, self.verify_windows)
        own = {text.name: cut.tokens_WT[needed:]}
        fitting = self._read_more(self.fit_data, tokenizer, texts=own)
        params = self.load(maps)
        if maps is None and self.fit_windows:
            fit |= {"model": cfg.model, "data": ", ".join(fitting)}
            maps = fit_kv_maps(params, np.concatenate([*fitting.values()]), **fit)
            params = {**params, "kv_maps": maps}
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

    def _read_more(
        self, paths: Iterable[str], tokenizer: Any, limit: int | None = None, texts: Any = None
    ) -> dict[str, np.ndarray]:
        """`texts` and windows of further files, by name; by path where two have the same name."""
        texts = {} if texts is None else texts
        for path in paths:
            text, cut = read_windows(path, tokenizer, self.seq_len, limit)
            texts[path if text.name in texts else text.name] = cut.tokens_WT
        return texts

    def _fit_settings(self, model: ModelConfig) -> dict[str, Any]:
        """Settings of `fit_kv_maps`, checked."""
        barred = () if self.protocol == "continuation" else PROMPT_FEATURES
        features = self.features or tuple(name for name in FEATURES if name not in barred)
        layers = check_fit(self.layers or halting_layers(model), features, None, model)
        rank = self.rank if 0 < self.rank < feature_count(features, model) else None
        # Sums of products as large as the maps' are slow to add up: larger batches, fewer sums.
        settings = {"layers": layers, "features": features, "rank": rank}
        return settings | {"batch_size": 4 * self.batch_size, "progress": True}

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
