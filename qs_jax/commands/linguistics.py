"""`python -m qs_jax linguistics`: which words halt, which fuse, and what it does to predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qs_jax.commands.maps import find_maps
from qs_jax.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from qs_jax.config import Config
    from qs_jax.evaluation.linguistics import Aligned, Observed, TaggedText
    from qs_jax.models import Params


@dataclasses.dataclass
class Linguistics:
    """Measure halting by part of speech, fused pairs against constituents, and predictions."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    preset: str
    """Mechanisms to run: a name, or FILE.json."""
    out: Path
    """Results, as JSON."""
    treebank: Path | None = None
    """Zip file or folder of the Penn Treebank (combined/*.mrg) or of the Brown corpus."""
    tag_map: Path | None = None
    """From its tags to the 12 universal ones; by default en-ptb.map or en-brown.map in the folder
    universal_tagset beside the treebank, or in NLTK's data."""
    text: str | None = None
    """Instead of a treebank: wikitext-103, or a file, tagged by spaCy; it has no constituents."""
    spacy: str = "en_core_web_sm"
    """The spaCy model that tags --text."""
    protocol: Literal["teacher-forced", "continuation"] | None = None
    """Score every position; or let mechanisms act on a prompt and score what follows. By default
    teacher-forced, unless the preset can act on prompts only."""
    limit: int | None = None
    """Take the first N windows only."""
    seq_len: int = 512
    """Tokens of each window."""
    batch_size: int = 4
    """Windows at a time; their logits are held at once."""
    continuation_tokens: int = 128
    """Under continuation: the last tokens of each window, which are scored."""
    kv_maps: Path | None = None
    """Maps of the "extrapolate" policy; by default those beside the preset's file, or
    kv_maps.safetensors in the checkpoint folder."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""
    overwrite: bool = False
    """Replace --out."""

    def run(self) -> None:
        """Check, score, write, report."""
        from qs_jax import ModelConfig, load, load_tokenizer
        from qs_jax.checkpoint import choose_dtype, read_manifest
        from qs_jax.evaluation.journal import check_target, write_json
        from qs_jax.evaluation.linguistics import align, describe, study
        from qs_jax.evaluation.perplexity import check_width, git_hash, versions

        check_target(self.out, overwrite=self.overwrite)
        if self.batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, got {self.batch_size}.")
        manifest = read_manifest(self.ckpt)
        model = ModelConfig.from_dict(manifest["model"])
        cfg = self._config(model.replace(dtype=choose_dtype(self.dtype, model)))
        maps, maps_hash = find_maps(cfg, self.ckpt, self.kv_maps, self.preset)
        aligned = align(self._words(), load_tokenizer(self.ckpt), self.seq_len, self.limit)
        check_width(aligned.windows.tokens_WT.shape[1], cfg)
        params, _ = load(self.ckpt, dtype=self.dtype)
        dense = self._observe(params, aligned, cfg.replace(quicksilver=None), "dense")
        if maps is not None:
            params["kv_maps"] = maps
        observed = self._observe(params, aligned, cfg, self.preset)
        assert cfg.quicksilver is not None
        result = study(aligned, dense, observed, cfg)
        config = {
            "preset": Path(self.preset).name,
            "quicksilver": cfg.quicksilver.to_dict(),
            "protocol": cfg.effective_protocol,
            "continuation_tokens": self.continuation_tokens,
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "dtype": cfg.model.dtype,
            "spacy": self.spacy if self.text is not None else None,
            "kv_maps_sha256": maps_hash,
        }
        content = result | {
            "corpus": describe(aligned),
            "config": config,
            "model": {"source": manifest["source"], "fingerprint": manifest["params"]},
            "versions": versions(),
            "git": git_hash(),
        }
        write_json(self.out, content)
        self._report(content)

    def _config(self, model: Any) -> Config:
        from qs_jax import Config, presets

        quicksilver = presets.by_name(self.preset, model)
        if quicksilver.is_off:
            raise InputError(
                f"preset {self.preset!r} has no mechanisms, so there is nothing to compare with "
                "the dense model."
            )
        protocol = self.protocol or (
            "continuation" if quicksilver.prompts_only else "teacher-forced"
        )
        return Config(
            model=model,
            quicksilver=quicksilver,
            protocol=protocol,
            continuation_tokens=self.continuation_tokens,
            engine="masked",
        )

    def _words(self) -> TaggedText:
        from qs_jax.evaluation.linguistics import read_treebank, tag_text

        if (self.treebank is None) == (self.text is None):
            raise InputError("give either --treebank or --text.")
        if self.treebank is not None:
            return read_treebank(self.treebank, self.tag_map)
        assert self.text is not None
        if self.tag_map is not None:
            raise InputError("--tag-map is for --treebank: spaCy gives universal tags itself.")
        return tag_text(self.text, self.spacy)

    def _observe(self, params: Params, aligned: Aligned, cfg: Config, name: str) -> Observed:
        """Score every window, with a bar on standard error."""
        from tqdm import tqdm

        from qs_jax.evaluation.linguistics import observe, together

        parts = []
        with tqdm(total=len(aligned.windows.tokens_WT), unit="window", desc=name) as bar:
            for part in observe(params, aligned, cfg, batch_size=self.batch_size):
                parts.append(part)
                bar.update(len(part.nll_WT))
        return together(parts)

    def _report(self, content: dict[str, Any]) -> None:
        """Print the tables of what was measured."""
        from rich.console import Console

        console = Console()
        for table in tables(content):
            console.print(table)
        print(f"wrote {self.out}")  # rich would break long paths


def tables(content: dict[str, Any]) -> Iterator[Table]:
    """Halting by category, fused pairs by layer, and predictions by kind of word."""
    from rich.table import Table

    how = "simulated" if content["simulated"] else "counted"
    corpus, middle = content["corpus"], content["middle_layer"]
    table = Table(title=f"{corpus['corpus']} · {content['protocol']} · halting, {how}")
    for name in ("words", "tokens", "halted", "95 % interval", f"by layer {middle}", "mean depth"):
        table.add_column(name, justify="left" if name == "words" else "right")
    for scheme in ("paper", "auxiliary", "side", "piece"):
        for name, row in content["halting"][scheme].items():
            halted, depth = row["halted"], row["mean_depth"]
            if halted["count"]:
                cells = (percent(halted), interval(halted), percent(row["halted_by_middle"]))
                table.add_row(name, f"{halted['count']:,}", *cells, f"{depth:.1f}")
    yield table
    if content["fusion"] is not None:
        table = Table(title="pairs of neighbouring tokens inside one constituent")
        for name in ("pairs", "number", "in one word", "any phrase", "base phrase"):
            table.add_column(name, justify="left" if name == "pairs" else "right")
        for name, row in content["fusion"].items():
            name = "all adjacent (baseline)" if name == "baseline" else f"fused by {name}"
            cells = (percent(row["all"]["phrase"]), percent(row["all"]["base"]))
            table.add_row(name, f"{row['pairs']:,}", f"{row['inside_word']:,}", *cells)
        yield table
    table = Table(title="next-token prediction, QuickSilver minus dense")
    for name in ("predicted word", "tokens", "dense accuracy", "change", "change of NLL, nats"):
        table.add_column(name, justify="left" if name == "predicted word" else "right")
    for name, row in content["prediction"]["predicted"]["side"].items():
        if row["tokens"]:
            change = f"{100 * row['accuracy_change']:+.1f} points"
            accuracy = f"{row['dense_accuracy']:.1%}"
            table.add_row(name, f"{row['tokens']:,}", accuracy, change, f"{row['nll_change']:+.3f}")
    yield table


def percent(entry: dict[str, Any]) -> str:
    """A share, or a dash where nothing was counted."""
    return "-" if entry["share"] is None else f"{entry['share']:.1%}"


def interval(entry: dict[str, Any]) -> str:
    """The interval of a share."""
    if entry["interval"] is None:
        return "-"
    low, high = entry["interval"]
    return f"{100 * low:.1f} to {high:.1%}"
