"""`python -m qs_jax report`: what every token did at every layer, as one HTML file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qs_jax.commands.maps import find_maps
from qs_jax.errors import InputError

if TYPE_CHECKING:
    from qs_jax.config import ModelConfig
    from qs_jax.models import Params
    from qs_jax.report import PresetRuns, TextRuns

# Under "continuation" the last part of a text is scored: as many tokens at most, and this share.
_CONTINUATION, _CONTINUATION_SHARE = 128, 4


@dataclasses.dataclass
class Report:
    """Show what presets do to a text, token by token and layer by layer, in one HTML file."""

    out: Path
    """The page; it opens from disk and needs no network."""
    ckpt: Path | None = None
    """Folder written by convert.hf_to_flax; needed with --text."""
    text: str | None = None
    """The text itself, or the name of a file that holds it; - reads standard input."""
    preset: tuple[str, ...] = ("balanced",)
    """Presets to compare on the text: names, or FILE.json, one after another."""
    protocol: Literal["teacher-forced", "continuation"] | None = None
    """Mechanisms act on every token, or on a prompt only, and what follows it is scored. By default
    on every token, unless a preset can act on prompts only."""
    continuation_tokens: int | None = None
    """Under continuation: the last tokens, which are scored; by default a quarter of the text, 128
    at most."""
    limit_tokens: int | None = None
    """Take the first tokens of the text only."""
    all_combinations: bool = True
    """Run every combination of a preset's mechanisms; otherwise the dense model and the preset."""
    every_signal: bool = False
    """Compute logit-lens entropies of every layer for every combination, not for the dense model
    and the whole preset only; they cost several times the forward pass."""
    kv_maps: Path | None = None
    """Maps of the "extrapolate" policy; by default those beside the preset's file, or
    kv_maps.safetensors in the checkpoint folder."""
    results: tuple[Path, ...] = ()
    """Results files of `evaluate`, to show as well, or instead of a text."""
    search: Path | None = None
    """FILE.search.json of `calibrate`: its Pareto front."""
    ablation: Path | None = None
    """Result of benchmarks.ablation: isolated and cumulative bars."""
    figures: Path | None = None
    """Folder for the same figures as PNG and SVG (extra "plots")."""
    title: str = "QuickSilver report"
    """Of the page."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""
    overwrite: bool = False
    """Replace --out."""

    def run(self) -> None:
        """Check, run, write."""
        from qs_jax import report as reports

        if self.out.exists() and not self.overwrite:
            raise InputError(f"{self.out} exists: name another --out, or pass --overwrite.")
        if not self.out.parent.is_dir():
            raise InputError(f"there is no folder {self.out.parent} to write {self.out.name} to.")
        if not (self.text is not None or self.results or self.search or self.ablation):
            raise InputError("give what to show: --text, --results, --search or --ablation.")
        if self.figures is not None:
            from qs_jax.report import figures

            figures.require_matplotlib()
        results = [reports.read_results(path) for path in self.results]
        front = reports.read_front(self.search) if self.search is not None else None
        ablation = reports.read_ablation(self.ablation) if self.ablation is not None else None
        about, text = self._text() if self.text is not None else ({}, None)
        report = reports.Report(self.title, about, text, results, front, ablation)
        reports.write(report, self.out)
        print(f"wrote {self.out} ({self.out.stat().st_size / 1e6:.1f} MB)")
        if self.figures is not None:
            from qs_jax.report import figures

            for path in figures.save(report, self.figures):
                print(f"wrote {path}")

    def _text(self) -> tuple[dict[str, str], TextRuns]:
        """Run the text; also the facts it goes with."""
        import numpy as np

        from qs_jax import Config, load, load_tokenizer, presets
        from qs_jax.checkpoint import read_manifest
        from qs_jax.evaluation.perplexity import git_hash, versions
        from qs_jax.report import TextRuns, labels

        if self.ckpt is None:
            raise InputError("--text needs --ckpt, the model that reads it.")
        if not self.preset:
            raise InputError("--preset names nothing.")
        manifest, tokenizer = read_manifest(self.ckpt), load_tokenizer(self.ckpt)
        ids = self._ids(tokenizer)
        params, model = load(self.ckpt, dtype=self.dtype)
        if len(ids) > model.max_positions:
            raise InputError(
                f"the text has {len(ids)} tokens, this model {model.max_positions} positions: "
                "shorten it, or pass --limit-tokens."
            )
        chosen = [presets.by_name(name, model) for name in self.preset]
        protocol = self.protocol
        if protocol is None:
            alone = any(qs.prompts_only for qs in chosen)
            protocol = "continuation" if alone else "teacher-forced"
        scored = self.continuation_tokens
        if scored is None:
            scored = max(1, min(_CONTINUATION, len(ids) // _CONTINUATION_SHARE))
        if protocol == "continuation" and scored >= len(ids):
            raise InputError(
                f"the text has {len(ids)} tokens, so no prompt before its last {scored}: give more "
                "text, or lower --continuation-tokens."
            )
        cfg = Config(model=model, protocol=protocol, continuation_tokens=scored, engine="masked")
        runs = [
            self._preset(name, params, model, ids, cfg.replace(quicksilver=qs))
            for name, qs in zip(self.preset, chosen, strict=True)
        ]
        continued = protocol == "continuation"
        prompt = len(ids) - scored if continued else 0
        about = {
            "model": str(manifest["source"]),
            "tokens": f"{len(ids):,}",
            "protocol": f"{protocol}, last {scored} tokens scored" if continued else protocol,
            "dtype": model.dtype,
            "engine": "masked: every token is computed, savings are simulated",
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
            "commit": git_hash() or "not from a repository",
        }
        told = TextRuns(np.asarray(ids), labels(tokenizer, ids), prompt, runs)
        return about, told

    def _ids(self, tokenizer: Any) -> list[int]:
        import sys

        assert self.text is not None
        text = sys.stdin.read() if self.text == "-" else self.text
        if _is_file(self.text):
            text = Path(self.text).read_text(encoding="utf-8")
        if self.limit_tokens is not None and self.limit_tokens < 2:
            raise InputError(f"--limit-tokens must be at least 2, got {self.limit_tokens}.")
        ids = tokenizer(text, verbose=False).input_ids[: self.limit_tokens]
        if len(ids) < 2:
            raise InputError(f"the text has {len(ids)} token(s); there is nothing to predict.")
        return list(ids)

    def _preset(
        self, name: str, params: Params, model: ModelConfig, ids: list[int], cfg: Any
    ) -> PresetRuns:
        import numpy as np
        from tqdm import tqdm

        from qs_jax.report import PresetRuns, trace
        from qs_jax.report.combinations import combinations

        maps, _ = find_maps(cfg, self.ckpt or Path(), self.kv_maps, name)
        given = params if maps is None else {**params, "kv_maps": maps}
        assert cfg.quicksilver is not None
        total = len(combinations(cfg.quicksilver, self.all_combinations))
        told = Path(name).stem if name.endswith(".json") else name
        row = np.asarray(ids, np.int32)
        running = trace(
            given,
            row,
            cfg,
            all_combinations=self.all_combinations,
            every_signal=self.every_signal,
        )
        runs = list(tqdm(running, total=total, unit="run", desc=told))
        sizes = None if maps is None else maps.sizes
        return PresetRuns(told, cfg, runs, sizes)


def _is_file(name: str) -> bool:
    """Whether a text is the name of a file; most texts cannot be one at all."""
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False
