"""`python -m qs_jax report`: every token at every layer, as one HTML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from qs_jax import report as reports
from qs_jax.commands.options import TextOptions
from qs_jax.config import Config
from qs_jax.errors import InputError
from qs_jax.files import write_whole
from qs_jax.load import load_tokenizer
from qs_jax.mechanisms.kv_maps import KVMaps
from qs_jax.models import Params
from qs_jax.report import PresetRuns, TextRuns, figures


@dataclasses.dataclass(kw_only=True)
class Report(TextOptions):
    """Show a text under presets, token by token and layer by layer, in one HTML file."""

    out: Path
    """The page; it opens from disk and needs no network."""
    ckpt: Path | None = None  # type: ignore[assignment]
    """As the other commands take it; needed with --text."""
    preset: tuple[str, ...] = ("balanced",)  # type: ignore[assignment]
    """Presets to compare on the text: names, or FILE.json, one after another."""
    all_combinations: bool = True
    """Run every combination of a preset's mechanisms; otherwise the dense model and the preset."""
    results: tuple[Path, ...] = ()
    """Results files of `evaluate`, to show as well, or instead of a text."""
    search: Path | None = None
    """FILE.search.json of `calibrate`: its Pareto front."""
    figures: Path | None = None
    """Folder for the same figures as PNG and SVG (extra "plots")."""
    title: str = "QuickSilver report"
    """Title of the page."""

    def targets(self) -> list[tuple[str, Path]]:
        """The page and the figures."""
        if self.figures is None:
            return super().targets()
        shown = map(_name, dict.fromkeys(self.preset)) if self.text is not None else ()
        files = figures.names([*shown], len(self.results), self.search is not None)
        return [*super().targets(), *(("--figures", self.figures / name) for name in files)]

    def run(self) -> None:
        """Check, run, write."""
        self.check_out(makes=self.figures)
        if not (self.text is not None or self.results or self.search):
            raise InputError("give something to show: --text, --results or --search.")
        if self.figures is not None:
            figures.require_matplotlib()
        results = [reports.read_results(path) for path in self.results]
        front = reports.read_front(self.search) if self.search is not None else None
        about, text = self._text() if self.text is not None else ({}, None)
        report = reports.Report(self.title, about, text, results, front)
        paths = [path for _, path in self.targets()]
        with write_whole(*paths) as (page, *drawn):
            reports.write(report, page)
            if drawn:
                figures.save(report, drawn[0].parent)
        for path in paths:
            print(f"wrote {path}")

    def _text(self) -> tuple[dict[str, str], TextRuns]:
        """The text under every preset, and the facts it goes with."""
        if self.ckpt is None:
            raise InputError("--text needs --ckpt, the model that reads it.")
        if not self.preset:
            raise InputError("--preset names nothing.")
        tokenizer = load_tokenizer(self.folder)
        ids, _ = self.encode_text(tokenizer)
        common = {"continuation_tokens": self.scored_tokens(len(ids)), "engine": "masked"}
        cfgs = {name: self.config(name, **common) for name in self.preset}
        protocols = {cfg.effective_protocol for cfg in cfgs.values()}
        protocol = "continuation" if "continuation" in protocols else "teacher-forced"
        cfgs = {name: cfg.replace(protocol=protocol) for name, cfg in cfgs.items()}
        maps = {name: self.find_maps(cfg, name)[0] for name, cfg in cfgs.items()}
        params, row = self.load(), np.asarray(ids, np.int32)
        runs = [self._preset(name, params, row, cfg, maps[name]) for name, cfg in cfgs.items()]
        cfg = runs[0].cfg
        prompt = len(ids) - cfg.continuation_tokens if protocol == "continuation" else 0
        origin = self.origin(cfg)
        scored = f", last {len(ids) - prompt} tokens scored" if prompt else ""
        about = {
            "model": str(origin["model"]["source"]),
            "tokens": f"{len(ids):,}",
            "protocol": protocol + scored,
            "dtype": cfg.model.dtype,
            "engine": "masked: every token is computed, savings are simulated",
            "versions": ", ".join(f"{name} {of}" for name, of in origin["versions"].items()),
            "commit": origin["git"] or "not from a repository",
        }
        return about, TextRuns(np.asarray(ids), reports.labels(tokenizer, ids), runs)

    def _preset(
        self, name: str, params: Params, row: Any, cfg: Config, maps: KVMaps | None
    ) -> PresetRuns:
        params = params if maps is None else {**params, "kv_maps": maps}
        every = self.all_combinations
        runs = reports.trace(params, row, cfg, all_combinations=every, progress=True)
        sizes = None if maps is None else maps.sizes
        return PresetRuns(_name(name), cfg, list(runs), sizes)


def _name(preset: str) -> str:
    """What the page calls a preset."""
    return Path(preset).name.removesuffix(".json")
