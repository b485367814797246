"""`python -m qs_jax calibrate`: the preset that saves most within a quality budget."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qs_jax.errors import InputError

if TYPE_CHECKING:
    from qs_jax.calibration import Calibration
    from qs_jax.config import Config, ModelConfig
    from qs_jax.models import Params


@dataclasses.dataclass
class Calibrate:
    """Find the preset that saves most within a quality budget, and check it on other text."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    data: str
    """wikitext-103, c4, or a file: .jsonl, .jsonl.gz, .json.gz (field "text"), or plain text."""
    max_ppl_increase: float
    """The budget: perplexity above the dense model's, bounded with --confidence."""
    out: Path
    """The preset, as JSON; what was measured and the maps it reads are written beside it."""
    protocol: Literal["teacher-forced", "continuation"] = "continuation"
    """continuation: mechanisms act on prompts; teacher-forced: on every token."""
    objective: Literal["exact_flops", "paper_flops", "layer_tokens"] = "exact_flops"
    """What to save as much of as possible."""
    windows: int = 16
    """Windows to search on."""
    verify_windows: int = 32
    """Windows after those, to verify on: the more, the closer the bound."""
    fit_windows: int = 64
    """Windows after those, to fit the maps of the "extrapolate" policy on; 0 takes those beside the
    checkpoint, if there are any."""
    kv_maps: Path | None = None
    """Maps fitted before, on other text: nothing is fitted."""
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
    """What the maps read (docs/mechanisms.md); by default everything that the protocol allows."""
    rank: int = 256
    """Numbers of the code that the maps of all deeper layers share; 0, or a model with no more
    features than that, reads the features."""
    policies: tuple[Literal["skip", "propagate", "extrapolate"], ...] | None = None
    """KV policies to try; by default skip, and extrapolate where maps are fitted."""
    max_evaluations: int = 60
    """Candidates measured for each KV policy."""
    candidates: int = 4
    """Candidates of the front to verify."""
    amq_grid: bool = False
    """Also score the paper's grid of entropy thresholds for bits (E.9), into OUT's .amq.json."""
    timed_runs: int = 3
    """Runs of the winner and of the dense model, in turn, for the measured time; 0 for none."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""
    overwrite: bool = False
    """Replace --out."""

    def run(self) -> None:
        """Check, search, write, report."""
        from qs_jax import Config, load, load_tokenizer
        from qs_jax.calibration import save, search
        from qs_jax.evaluation.perplexity import read_windows

        if self.out.exists() and not self.overwrite:
            raise InputError(f"{self.out} exists: name another --out, or pass --overwrite.")
        if not self.out.parent.is_dir():
            raise InputError(f"there is no folder {self.out.parent} to write {self.out.name} to.")
        for name in ("windows", "verify_windows"):
            if getattr(self, name) < 2:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be at least 2: one has no spread to bound.")
        if self.fit_windows < 0:
            raise InputError(f"--fit-windows must not be negative, got {self.fit_windows}.")
        needed = self.windows + self.verify_windows
        tokenizer = load_tokenizer(self.ckpt)
        text, cut = read_windows(self.data, tokenizer, self.seq_len, needed + self.fit_windows)
        tokens_WT = cut.tokens_WT
        if cut.tokens_in_text < self.seq_len:
            raise InputError(
                f"{text.name} has {cut.tokens_in_text} tokens, less than one window of "
                f"{self.seq_len}: give more text, or lower --seq-len."
            )
        if len(tokens_WT) < needed + self.fit_windows:
            raise InputError(
                f"{text.name} has {len(tokens_WT)} windows of {self.seq_len} tokens; "
                f"{self.windows} to search on, {self.verify_windows} to verify on and "
                f"{self.fit_windows} for the maps were asked for."
            )
        others = {}
        for path in self.also:
            other, more = read_windows(str(path), tokenizer, self.seq_len, self.verify_windows)
            others[other.name] = more.tokens_WT
        params, model = load(self.ckpt, dtype=self.dtype)
        cfg = Config(
            model=model, protocol=self.protocol, continuation_tokens=self.continuation_tokens
        )
        params = self._with_maps(params, tokens_WT[needed:], model, text.name, tokenizer)
        found = search(
            params,
            tokens_WT[:needed],
            cfg,
            max_ppl_increase=self.max_ppl_increase,
            objective=self.objective,
            confidence=self.confidence,
            verify_share=self.verify_windows / needed,
            also=others,
            policies=self.policies,
            layers=self.layers,
            max_evaluations=self.max_evaluations,
            candidates=self.candidates,
            batch_size=self.batch_size,
            data=text.name,
            timed_runs=self.timed_runs,
            progress=True,
        )
        files = save(found, self.out, model)
        if self.amq_grid:
            files.append(self._amq_grid(params, tokens_WT[: self.windows], cfg))
        self._report(found, files)

    def _amq_grid(self, params: Params, tokens_WT: Any, cfg: Config) -> Path:
        from qs_jax.calibration import amq_grid
        from qs_jax.evaluation.journal import write_json

        points = amq_grid(params, tokens_WT, cfg, batch_size=self.batch_size, progress=True)
        path = self.out.with_name(f"{self.out.stem}.amq.json")
        write_json(path, {"points": [dataclasses.asdict(point) for point in points]})
        return path

    def _with_maps(
        self, params: Params, fitting_WT: Any, model: ModelConfig, data: str, tokenizer: Any
    ) -> Params:
        from qs_jax import fit_kv_maps
        from qs_jax.calibration.families import halting_layers
        from qs_jax.evaluation.perplexity import read_windows
        from qs_jax.mechanisms.kv_maps import FEATURES, PROMPT_FEATURES, KVMaps, feature_count

        if self.kv_maps is not None:
            return {**params, "kv_maps": KVMaps.load(self.kv_maps)}
        if not self.fit_windows:
            return params
        layers = self.layers or halting_layers(model)
        for path in self.fit_data:
            text, more = read_windows(str(path), tokenizer, self.seq_len, None)
            fitting_WT = np.concatenate([fitting_WT, more.tokens_WT])
            data = f"{data}, {text.name}"
        features = self.features
        if features is None:
            only = () if self.protocol == "continuation" else PROMPT_FEATURES
            features = tuple(name for name in FEATURES if name not in only)
        maps = fit_kv_maps(
            params,
            fitting_WT,
            layers,
            model,
            features=features,
            batch_size=4 * self.batch_size,  # sums of products as large as these are slow to add up
            rank=self.rank if 0 < self.rank < feature_count(features, model) else None,
            data=data,
            progress=True,
        )
        return {**params, "kv_maps": maps}

    def _report(self, found: Calibration, files: list[Path]) -> None:
        """Print what was found on the verification windows."""
        from rich.console import Console
        from rich.table import Table

        console = Console()
        table = Table(title="candidates on the verification windows")
        for name in (
            "KV policy",
            "perplexity",
            "upper bound",
            "exact FLOPs",
            "paper FLOPs",
            "kept",
        ):
            table.add_column(name, justify="left" if name == "KV policy" else "right")
        for entry in found.verified:
            bound = entry["upper_bound"]
            table.add_row(
                entry["family"],
                f"{entry['ppl_increase']:+.3f}",
                "none" if bound is None else f"{bound:+.3f}",
                f"{entry['exact_flops_saved']:.1%}",
                f"{entry['paper_flops_saved']:.1%}",
                "yes" if entry["within_budget"] else "no",
            )
        if found.verified:
            console.print(table)
        verified = found.preset.provenance["verified"]
        if found.preset.is_off:
            console.print(verified["reason"])
        elif verified["measured_time_saved"] is not None:
            console.print(f"time saved here, measured: {verified['measured_time_saved']:.1%}")
        for path in files:
            print(f"wrote {path}")  # rich would break long paths
