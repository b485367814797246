"""Reading a converted checkpoint folder back as parameters, configuration and tokenizer.

Layout of the folder (written by `convert.hf_to_flax`, always whole: `qs_jax.json` comes last)::

    qs_jax.json    the manifest: format version, ModelConfig, provenance
    params/        an Orbax checkpoint of the stacked tree
    config.json    the Hugging Face config the model came with
    tokenizer files, generation_config.json, chat template: as they came
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
from qs_jax.errors import CheckpointError, ConfigError, NonFiniteError
from qs_jax.mechanisms.kv_maps import FILE_NAME, KVMaps
from qs_jax.models import Params, abstract_params
from qs_jax.models.cpu import processor_multiplies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST = "qs_jax.json"
PARAMS = "params"
FORMAT_VERSION = 1


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a converted checkpoint.

    Raises:
      CheckpointError: The folder is missing, was not converted, was converted only in part, or by
        a version of this library that wrote another format.
    """
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
            raise CheckpointError(
                f"{folder} has format {version}, this library reads {FORMAT_VERSION}. Convert "
                "again."
            )
        ModelConfig.from_dict(manifest["model"])
        missing = {"num_params", "params", "source"} - set(manifest)
        if missing:
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


def load(
    path: str | Path,
    *,
    dtype: str | None = "auto",
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Params, ModelConfig]:
    """Read a converted checkpoint, and check it against its checksum.

    Args:
      path: Folder written by `python -m convert.hf_to_flax`.
      dtype: "float32" or "bfloat16" to convert while reading; "auto" is the faster of the two on
        the device; None keeps the stored dtype.
      devices: Shard the parameters over these, tensor-parallel; None puts them on the default
        device.

    Returns:
      The stacked parameter tree, and the configuration with the dtype it has now. The tree holds
      "kv_maps" where there is a kv_maps.safetensors in the folder, or maps for this checkpoint come
      with the library (`qs_jax.mechanisms.shipped_maps`).

    Raises:
      CheckpointError: The folder is missing, incomplete, damaged or of another format.
      ConfigError: `dtype` is none of these, or `devices` is empty.
      NonFiniteError: A weight is NaN or infinite.
    """
    manifest = read_manifest(path)
    model = ModelConfig.from_dict(manifest["model"])
    if devices is not None and len(devices) == 0:
        raise ConfigError("devices is empty; None takes the default device.")
    model = model.replace(dtype=choose_dtype(dtype, model, devices[0] if devices else None))
    folder = Path(path).resolve() / PARAMS
    # TensorStore reads a missing chunk as zeros, and Orbax leaves reads pending when one fails.
    if fingerprint(folder) != manifest["params"]:
        raise CheckpointError(f"{folder}: files were lost or changed. Convert again.")
    params = _restore(folder, _placed(abstract_params(model), devices))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    bad = [jax.tree_util.keystr(key) for key, leaf in leaves if not _all_finite(leaf)]
    if bad:
        raise NonFiniteError(f"{path}: NaN or infinite weights in {', '.join(bad)}.")
    maps = _kv_maps(Path(path), manifest["source"], model)
    return params if maps is None else {**params, "kv_maps": maps}, model


def _kv_maps(path: Path, source: str, model: ModelConfig) -> KVMaps | None:
    """Maps of the "extrapolate" policy beside the checkpoint, or those shipped for it."""
    from qs_jax.mechanisms.shipped_maps import shipped_maps

    if (path / FILE_NAME).is_file():
        return KVMaps.load(path)
    return shipped_maps(model) if source.startswith("embedded ") else None


def choose_dtype(dtype: str | None, model: ModelConfig, device: Any = None) -> str:
    """The dtype in which a stored model is used on a device.

    "auto" is float32 on a CPU that does not multiply bfloat16 and on GPUs that do not (before
    compute capability 8), and bfloat16 on everything else. `python -m benchmarks.latency` times the
    dense model in both.

    Args:
      dtype: As for `load`.
      model: With the stored dtype.
      device: None is the default device.
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
    """The tokenizer of a folder, without network.

    Raises:
      TypeError: It is not one of the `tokenizers` library.
      Exception: Whatever `transformers` raises for files it cannot read.
    """
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


def _placed(tree: Params, devices: Sequence[jax.Device] | None) -> Params:
    """Abstract leaves with the sharding they shall be read with.

    Projections into heads and neurons are cut by columns, those back by rows, tables by tokens.
    Axes that the devices do not divide evenly, and everything else, are replicated.
    """
    mesh = None if devices is None else Mesh(np.asarray(devices), ("model",))

    def place(key_path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if mesh is None:
            sharding = SingleDeviceSharding(jnp.zeros(()).device)
        else:
            module, name = (entry.key for entry in key_path[-2:])
            spec: list[str | None] = [None] * len(leaf.shape)
            axis = {"out": 1, "down": 1, "embed": 0, "head": 0}.get(module, len(spec) - 1)
            sharded = name in ("kernel", "tokens") or module in ("qkv", "gate_up", "up")
            if sharded and leaf.shape[axis] % mesh.size == 0:
                spec[axis] = "model"
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, tree)


def _restore(folder: Path, target: Params) -> Params:
    import orbax.checkpoint as ocp  # slow to import

    logging.getLogger("absl").setLevel(logging.ERROR)
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder, args=args)
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{folder} is damaged or incomplete: {reason} Convert again."
        ) from error


@jax.jit
def _all_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()
