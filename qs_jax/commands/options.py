"""Options that commands share, and the values that follow from them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qs_jax import presets
from qs_jax.checkpoint import read_manifest
from qs_jax.config import Config, ModelConfig
from qs_jax.config.fields import Positive, Several, parse
from qs_jax.engine.devices import Devices, local_devices, place
from qs_jax.errors import InputError
from qs_jax.evaluation import perplexity
from qs_jax.evaluation.datasets import read_text_or_file
from qs_jax.files import check_targets
from qs_jax.load import choose_dtype, find_checkpoint, find_maps, load
from qs_jax.mechanisms.kv_maps import KVMaps
from qs_jax.models import Params


@dataclasses.dataclass(kw_only=True)
class RunOptions:
    """A checkpoint under a preset: the options of every command that runs a model."""

    ckpt: Path
    """A folder written by convert.hf_to_flax; or what that converts, which is done once, into the
    user's cache folder: a hub id ORG/NAME, a Hugging Face folder, a .gguf file, or embedded."""
    revision: str | None = None
    """Of a hub id: branch, tag or commit."""
    preset: str = "off"
    """Mechanisms to run: off (dense), balanced, fast-answers, paper, another name, or FILE.json."""
    protocol: Literal["teacher-forced", "continuation"] | None = None
    """Mechanisms act on every token, or on a prompt only; where a text is scored, every position
    is, or what follows the prompt. By default every token, unless the preset needs a prompt."""
    kv_maps: Path | None = None
    """Maps of the "extrapolate" policy; by default those beside the preset's file, or
    kv_maps.safetensors in the checkpoint folder."""
    allow_other_weights: bool = False
    """Take presets and maps that were made for other weights of the same sizes."""
    dtype: Literal["auto", "float32", "bfloat16"] | None = "auto"
    """Convert parameters while loading; auto takes the faster on this device, None keeps them."""
    weights: Literal["int8", "gguf"] | None = None
    """Hold projections as 8-bit codes, or as those of the GGUF file that was converted."""
    compilation_cache: str | None = None
    """Folder that keeps compiled programs for the next start, or off; by default $QS_JAX_CACHE, or
    qs-jax/xla in the user's cache folder."""

    def check(self) -> None:
        """Refuse values outside the types and ranges that the options are annotated with."""
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            parse(f"--{name.replace('_', '-')}", getattr(self, name), kind)

    @functools.cached_property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return find_checkpoint(self.ckpt, self.revision)

    def config(self, preset: str | None = None, **settings: Any) -> Config:
        """The configuration of a preset, by default --preset; the weights are not read."""
        model = ModelConfig.from_dict(read_manifest(self.folder)["model"])
        model = model.replace(dtype=choose_dtype(self.dtype, model))
        model = model.replace(weights=None) if self.allow_other_weights else model
        return presets.config(preset or self.preset, model, protocol=self.protocol, **settings)

    def find_maps(self, cfg: Config, preset: str | None = None) -> tuple[KVMaps | None, str | None]:
        """Maps of a preset and their file's SHA-256; None twice where it reads none."""
        maps, path = find_maps(cfg, self.folder, self.kv_maps, preset or self.preset)
        return maps, path and hashlib.sha256(path.read_bytes()).hexdigest()

    def warn_of_length(self, cfg: Config, tokens: int) -> None:
        """Say in one line that a preset was not verified at a length."""
        assert cfg.quicksilver is not None
        if line := presets.unverified(cfg.quicksilver, tokens):
            print(f"note: {line}", file=sys.stderr)

    def load(self, maps: KVMaps | None = None, devices: Devices | None = None) -> Params:
        """The parameters where devices read them, with the maps that a call reads."""
        mesh = devices if isinstance(devices, Mesh) else None
        params, _ = load(self.folder, dtype=self.dtype, weights=self.weights, devices=mesh)
        return place(params if maps is None else {**params, "kv_maps": maps}, devices)

    def settings(self, cfg: Config, **others: Any) -> dict[str, Any]:
        """Settings that decide the numbers of a results file; paths go by their last name."""
        assert cfg.quicksilver is not None
        return others | {
            "backend": jax.default_backend(),
            "dtype": cfg.model.dtype,
            "engine": cfg.engine,
            "preset": Path(self.preset).name,
            "protocol": cfg.effective_protocol,
            "quicksilver": cfg.quicksilver.to_dict(),
            "weights": self.weights,
        }

    def origin(self, cfg: Config) -> dict[str, Any]:
        """The model and the code that produced a results file."""
        manifest = read_manifest(self.folder)
        config = cfg.model.to_dict() | {"weights": manifest["model"].get("weights")}
        model = {"source": manifest["source"], "config": config}
        model |= {name: manifest[name] for name in ("revision",) if name in manifest}
        return {"model": model, "versions": perplexity.versions(), "git": perplexity.git_hash()}


@dataclasses.dataclass(kw_only=True)
class FileOptions(RunOptions):
    """A run whose result is a file."""

    out: Path
    """Results, as JSON."""
    overwrite: bool = False
    """Replace a file that exists."""

    def targets(self) -> list[tuple[str, Path]]:
        """Every file that may be written, and the option it belongs to."""
        return [("--out", self.out)]

    def check_out(self, **options: Any) -> None:
        """Refuse, before anything is computed, files that cannot be written or must not be."""
        read: list[tuple[str, Path]] = []
        for name in "preset kv_maps data also fit_data text results search".split():
            values = getattr(self, name, None) or ()
            option = f"--{name.replace('_', '-')}"
            read += [(option, Path(v)) for v in (values if isinstance(values, tuple) else [values])]
        options = {"overwrite": self.overwrite, "reads": read} | options
        check_targets(self.targets(), **options)


@dataclasses.dataclass(kw_only=True)
class ScoringOptions(FileOptions):
    """A run that scores many rows."""

    engine: Literal["masked", "compact"] = "masked"
    """masked computes everything and selects: savings are simulated. compact makes the same
    decisions and computes active tokens only."""
    batch_size: Positive = 8
    """Rows scored at a time."""
    devices: str = "1"
    """Local devices that share each batch: a number, or all; 2x4 cuts the parameters, too, over 4
    devices for each half of a batch."""

    def local_devices(self) -> Devices | None:
        """The devices to share batches; None for one."""
        return local_devices(self.devices)


@dataclasses.dataclass(kw_only=True)
class TextOptions(FileOptions):
    """A run over one text."""

    text: str | None = None
    """The text itself, or the name of a file that holds it; - reads standard input. What looks like
    the name of a file, and is none, is refused."""
    continuation_tokens: Positive | None = None
    """Under continuation: the last tokens, which are scored; by default a quarter of the text, 128
    at most."""
    limit_tokens: Several | None = None
    """Take the first tokens of the text only."""

    def encode_text(self, tokenizer: Any) -> tuple[list[int], int]:
        """Tokens of the text within the limit, and how many there are beyond it."""
        text = read_text_or_file(self.text or "").text
        ids = list(tokenizer(text, verbose=False).input_ids)
        if len(ids) < 2:
            raise InputError(f"the text has {len(ids)} token(s); there is nothing to predict.")
        return ids[: self.limit_tokens], max(len(ids) - (self.limit_tokens or len(ids)), 0)

    def scored_tokens(self, tokens: int) -> int:
        """How many of a text's last tokens are scored under continuation."""
        if self.continuation_tokens is not None:
            return self.continuation_tokens
        return max(1, min(128, tokens // 4))


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, lines: bool = False
) -> None:
    """Print rows under their columns, the first to the left and all others to the right."""
    table = Table(title=title, show_header=bool(columns), show_lines=lines)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(highlight=False, markup=False, emoji=False).print(table)  # names are no markup
