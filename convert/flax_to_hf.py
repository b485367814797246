"""Write a converted checkpoint back as a Hugging Face folder: the inverse of `hf_to_flax`.

`python -m convert.flax_to_hf --ckpt DIR --out HF_DIR`. Every tensor comes back bit for bit, in the
dtype it was stored in.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax.traverse_util import flatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from convert import mapping
from convert.classifier import export_head
from convert.errors import ConversionError, Problems
from convert.hf_config import model_config
from convert.sources import TOKENIZER_FILES, read_object
from convert.writer import check_folder
from qs_jax.checkpoint import read_manifest
from qs_jax.config import ModelConfig
from qs_jax.errors import exit_code
from qs_jax.files import write_json, write_whole
from qs_jax.load import load
from qs_jax.models import Params


def hf_tensors(params: Params, model: ModelConfig) -> dict[str, np.ndarray]:
    """Every tensor of a tree under its Hugging Face name, in its layout and the tree's dtype."""
    leaves, tensors = flatten_dict(params), {}
    for rule in mapping.rules_of(model):
        leaf = np.asarray(jax.device_get(leaves[rule.target]))
        for layer, name in enumerate(rule.names(model.num_layers)):
            tensor = rule.to_hf(leaf[layer] if rule.per_layer else leaf)
            tensors[mapping.full_name(name, model)] = np.ascontiguousarray(tensor)
    return tensors


def export(
    ckpt: str | Path, out: str | Path, *, max_shard_size: str = "5GB", quiet: bool = True
) -> Path:
    """Write a converted checkpoint back as a Hugging Face folder of safetensors.

    Args:
      ckpt: Folder written by convert.hf_to_flax.
      out: Folder to write; it must not exist, and appears whole or not at all.
      max_shard_size: Largest weight file, such as "5GB".
      quiet: Print no summary.

    Raises:
      ConversionError: config.json is not that of the checkpoint, or the head beside it cannot be
        written so.
    """
    source, target = Path(ckpt), Path(os.path.realpath(out))
    check_folder(target)
    described = ModelConfig.from_dict(read_manifest(source)["model"])
    head, labels = export_head(source, described)
    config = _config_of(source, described) | labels
    params, model = load(source, dtype=None)
    tensors = hf_tensors(params, model) | head
    try:
        plan = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConversionError(f"--max-shard-size {max_shard_size}: {error}") from error
    with write_whole(target) as (staged,):
        staged.mkdir()
        for file, names in plan.filename_to_tensors.items():
            shard = {name: tensors[name] for name in names}
            save_file(shard, staged / file, metadata={"format": "pt"})
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            write_json(staged / "model.safetensors.index.json", index)
        write_json(staged / "config.json", config | {"dtype": model.dtype})
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, staged / name)
        check_folder(target)  # nobody filled it meanwhile
    if not quiet:
        print(f"wrote {target}")
    return target


def _config_of(ckpt: Path, model: ModelConfig) -> dict[str, Any]:
    """The checkpoint's config.json, refused where it describes another model than the manifest."""
    config, generation = read_object(ckpt / "config.json"), ckpt / "generation_config.json"
    ends, problems = read_object(generation) if generation.is_file() else {}, Problems()
    if model_config(config, model.dtype, problems, ends)[0] != model:
        raise ConversionError(f"{ckpt / 'config.json'} is not that of the weights. Convert again.")
    return config


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    prog = "python -m convert.flax_to_hf"
    command = functools.partial(export, quiet=False)
    return exit_code(lambda: tyro.cli(command, prog=prog, args=argv))


if __name__ == "__main__":
    sys.exit(main())
