"""The files of a converted checkpoint folder, as `convert.hf_to_flax` writes them.

qs_jax.json is the manifest (format version, ModelConfig, provenance) and comes last; params/ is an
Orbax checkpoint of the stacked tree; config.json and the tokenizer's files are as they came.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError
from qs_jax.models import Params, abstract_params
from qs_jax.models.cpu import processor_multiplies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST = "qs_jax.json"
PARAMS = "params"
FORMAT_VERSION = 1


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a converted checkpoint; CheckpointError where there is none to be used."""
    folder, file = Path(path), Path(path) / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder.")
    if not file.is_file():
        raise CheckpointError(
            f"{folder} is not a converted checkpoint ({MANIFEST} is missing). "
            f"Make one with: python -m convert.hf_to_flax --source {folder} --out NEW_FOLDER"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if (version := manifest["format_version"]) != FORMAT_VERSION:
            raise ValueError(f"its format is {version}, this library reads {FORMAT_VERSION}")
        ModelConfig.from_dict(manifest["model"])
        if missing := {"num_params", "params", "source"} - set(manifest):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Convert again.") from error
    return manifest


def fingerprint(folder: Path) -> dict[str, int]:
    """Files below a folder, their bytes, and one CRC-32 over their names and contents."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = checksum = 0
    for path in files:
        checksum = zlib.crc32(path.relative_to(folder).as_posix().encode(), checksum)
        with path.open("rb") as file:
            while block := file.read(2**24):
                checksum = zlib.crc32(block, checksum)
                total += len(block)
    return {"files": len(files), "bytes": total, "crc32": checksum}


def choose_dtype(dtype: str | None, model: ModelConfig, device: Any = None) -> str:
    """The dtype in which a stored model is used on a device, by default the default device.

    "auto" is float32 on a CPU that does not multiply bfloat16 and on GPUs that do not (before
    compute capability 8), and bfloat16 on everything else. None is the stored dtype.
    """
    if dtype != "auto":
        return dtype or model.dtype
    device = jnp.zeros(()).device if device is None else device
    if device.platform == "cpu":
        return "bfloat16" if processor_multiplies() else "float32"
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    old = device.platform in ("gpu", "cuda") and major.isdigit() and int(major) < 8
    return "float32" if old else "bfloat16"


def transformers() -> ModuleType:
    """The package, imported when first needed (it takes seconds), without its advice on torch."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, without network; raises whatever `transformers` raises."""
    library = transformers()
    tokenizer = library.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if not isinstance(tokenizer, library.PreTrainedTokenizerFast):
        raise TypeError(f"{type(tokenizer).__name__} is not based on the tokenizers library")
    return tokenizer


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer stored in a converted checkpoint; no network is used.

    Raises:
      CheckpointError: The folder holds no tokenizer, or one that cannot be read.
    """
    read_manifest(path)
    try:
        return read_tokenizer(path)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"{path} holds no tokenizer that can be read ({type(error).__name__}: {error}). "
            "Convert again without --no-tokenizer."
        ) from error


def restore(path: Path, model: ModelConfig, devices: Sequence[jax.Device] | None) -> Params:
    """The parameters in the model's dtype, on the default device or sharded over several.

    Projections into heads and neurons are cut by columns, those back by rows, tables by tokens.
    Axes that the devices do not divide evenly, and everything else, are replicated.
    """
    import orbax.checkpoint as ocp  # slow to import

    logging.getLogger("absl").setLevel(logging.ERROR)
    mesh = None if devices is None else Mesh(np.asarray(devices), ("model",))

    def place(key_path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return leaf.update(sharding=SingleDeviceSharding(jnp.zeros(()).device))
        module, name = (entry.key for entry in key_path[-2:])
        spec: list[str | None] = [None] * len(leaf.shape)
        axis = {"out": 1, "down": 1, "embed": 0, "head": 0}.get(module, len(spec) - 1)
        sharded = name in ("kernel", "tokens") or module in ("qkv", "gate_up", "up")
        if sharded and leaf.shape[axis] % mesh.size == 0:
            spec[axis] = "model"
        return leaf.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    target = jax.tree_util.tree_map_with_path(place, abstract_params(model))
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path.resolve() / PARAMS, args=args)
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged: {reason} Convert again.") from error
