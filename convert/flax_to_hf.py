"""Write a converted checkpoint back as a Hugging Face folder: the inverse of `hf_to_flax`.

`python -m convert.flax_to_hf --ckpt DIR --out HF_DIR`. Every tensor comes back bit for bit, in the
dtype it was stored in.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import tyro
from flax.traverse_util import flatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.numpy import save_file

from convert import mapping
from convert.sources import TOKENIZER_FILES
from convert.staging import check_target, staging, write_json
from qs_jax.checkpoint import load
from qs_jax.config import ModelConfig
from qs_jax.errors import QuickSilverError
from qs_jax.models import Params


@dataclasses.dataclass
class Arguments:
    """Write a converted checkpoint back as a Hugging Face folder of safetensors."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    out: Path
    """Folder to write; it must not exist."""
    max_shard_size: str = "5GB"
    """Largest weight file."""


def hf_tensors(params: Params, model: ModelConfig) -> dict[str, np.ndarray]:
    """Every tensor of a tree under its Hugging Face name.

    Args:
      params: Stacked tree of `model`.
      model: Architecture.

    Returns:
      NumPy arrays in the dtype of the tree, contiguous, in the layout Hugging Face has them.
    """
    table, leaves = mapping.table_of(model), flatten_dict(params)
    tensors = {}
    for rule in table.rules:
        leaf = np.asarray(jax.device_get(leaves[rule.target]))
        for layer, name in enumerate(table.names(rule, model.num_layers)):
            one = leaf[layer] if rule.per_layer else leaf
            tensors[table.full_name(name)] = np.ascontiguousarray(rule.to_hf(one))
    return tensors


def export(ckpt: str | Path, out: str | Path, *, max_shard_size: str = "5GB") -> Path:
    """Write `ckpt` as a Hugging Face folder.

    Args:
      ckpt: Converted checkpoint.
      out: Folder to write; it appears whole or not at all.
      max_shard_size: Such as "5GB".

    Returns:
      The folder.

    Raises:
      ConversionError: `out` exists, or writing failed.
      CheckpointError: `ckpt` cannot be read.
    """
    source, target = Path(ckpt), Path(os.path.realpath(out))
    check_target(target)
    params, model = load(source, dtype=None)
    tensors = hf_tensors(params, model)
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with staging(target) as staged:
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
    return target


def main(argv: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    args = tyro.cli(Arguments, prog="python -m convert.flax_to_hf", args=argv)
    try:
        folder = export(args.ckpt, args.out, max_shard_size=args.max_shard_size)
    except (QuickSilverError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
