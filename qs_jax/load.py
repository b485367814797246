"""Loading a checkpoint: parameters, tokenizer, and the extrapolation maps that go with them.

What is not converted yet is converted here, once, into the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from urllib.parse import quote

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from qs_jax.checkpoint import (
    MANIFEST,
    PARAMS,
    check_codes,
    check_params_files,
    is_whole,
    read_manifest,
    read_tokenizer,
    transformers,
)
from qs_jax.config import Config, ModelConfig
from qs_jax.config.fields import parse
from qs_jax.engine.devices import Devices, as_mesh, make_mesh, shard, sharding_of
from qs_jax.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    NonFiniteError,
    QuickSilverError,
)
from qs_jax.files import user_cache
from qs_jax.jax_settings import default_settings, explain
from qs_jax.mechanisms.kv_maps import FILE_NAME, KVMaps, select
from qs_jax.models import Params, abstract_params
from qs_jax.models.cpu import processor_multiplies
from qs_jax.models.quantized import QKernel, in_int8
from qs_jax.presets import NAMES, maps_path, shipped_maps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WeightsOption: TypeAlias = Literal["int8", "gguf"] | None
_finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())


@default_settings()
def load(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = "auto",
    devices: Devices | None = None,
    weights: str | None = None,
) -> tuple[Params, ModelConfig]:
    """Read a checkpoint, and check it against its checksum.

    Args:
      path: Folder written by `python -m convert.hf_to_flax`; or what that converts, as
        `find_checkpoint` does once: a hub id `org/name`, a Hugging Face folder, a .gguf file, or
        `embedded`.
      revision: Of a hub id: branch, tag or commit.
      dtype: "float32" or "bfloat16" to convert while reading; "auto" is the faster of the two on
        the device; None keeps the stored dtype.
      devices: Cut the parameters over the axis "model" of a mesh (`qs_jax.make_mesh`), or over a
        sequence of devices, tensor-parallel; None is the default device.
      weights: How the projections of all layers are held. None: in `dtype`. "int8": a code of 8
        bits each and a scale for each output channel. "gguf": the 4- or 8-bit codes of the GGUF
        file that the checkpoint was converted from, which stand for the very weights. Embeddings,
        norms, head and activations stay in `dtype`.

    Returns:
      The stacked parameter tree, and the configuration with the dtype it has now. The tree holds
      "kv_maps" where there is a kv_maps.safetensors in the folder, or maps for this checkpoint come
      with the library.

    Raises:
      CheckpointError: The folder is missing, incomplete, damaged or of another format, or has no
        codes of a GGUF file; or the model cannot be fetched or converted.
      ConfigError: `dtype` or `weights` is none of these, `devices` is empty or another mesh, or a
        local checkpoint has a `revision`.
      NonFiniteError: A weight is NaN or infinite.
    """
    path = find_checkpoint(path, revision)
    manifest = read_manifest(path)
    model = ModelConfig.from_dict(manifest["model"])
    if devices is not None and not isinstance(devices, Mesh):
        if len(devices) == 0:
            raise ConfigError("devices is empty; None takes the default device.")
        devices = make_mesh(1, len(devices), devices)
    mesh = None if devices is None else as_mesh(devices)
    first = None if mesh is None else mesh.devices.flat[0]
    model = model.replace(dtype=choose_dtype(dtype, model, first))
    parse("weights", weights, WeightsOption)
    # TensorStore reads a missing chunk as zeros, and Orbax leaves reads pending when one fails.
    check_params_files(path, manifest)
    params = _restore(path, model, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if bad := [jax.tree_util.keystr(key) for key, leaf in leaves if not _finite(leaf)]:
        raise NonFiniteError(f"{path}: NaN or infinite weights in {', '.join(bad)}.")
    if weights == "int8":
        params = in_int8(params)
    if weights == "gguf":
        params = {**params, "layers": _with_codes(params["layers"], check_codes(path, manifest))}
    maps = path / FILE_NAME if (path / FILE_NAME).is_file() else shipped_maps(model)
    params = params if maps is None else {**params, "kv_maps": KVMaps.load(maps)}
    return params if mesh is None else shard(params, mesh), model


def load_tokenizer(path: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, given as to `load`.

    Raises:
      CheckpointError: There is no tokenizer, or one that cannot be read; or as `load` raises it.
      InputError: transformers is not installed.
    """
    folder = find_checkpoint(path, revision)
    read_manifest(folder)
    transformers()
    try:
        return read_tokenizer(folder)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"{folder} holds no tokenizer that can be read ({type(error).__name__}: {error}). "
            "Convert again without --no-tokenizer."
        ) from error


@default_settings()
def find_checkpoint(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a converted checkpoint; what is not converted yet is, into the user's cache.

    There it is found again without network. A hub model stays at the commit that it was converted
    from, which is in the manifest. A local source that changed is converted anew. Weights are held
    in bfloat16 where all of them are, else in float32. Terminals see what is done.

    Args:
      source: A converted folder, a hub id `org/name`, a Hugging Face folder, a .gguf file, or
        `embedded`.
      revision: Of a hub id: branch, tag or commit.

    Returns:
      `source` where it is converted, else a folder in qs-jax/checkpoints of $XDG_CACHE_HOME or
      ~/.cache.

    Raises:
      CheckpointError: It is none of these, or cannot be fetched or converted.
      ConfigError: A local source has a `revision`.
      OutputError: The folder cannot be written.
    """
    name = _cache_name(str(source), revision)
    if (Path(source) / MANIFEST).is_file():
        return Path(source)
    target = user_cache() / "checkpoints" / name
    if target.exists():
        if is_whole(target):
            return target
        shutil.rmtree(target, ignore_errors=True)  # damaged, or of another format
    from convert.hf_to_flax import convert

    shows = sys.stderr.isatty()
    if shows:
        print(f"converting {source} into {target}", file=sys.stderr)
    try:
        how: dict[str, Any] = {"revision": revision, "quiet": not shows}
        _, notes = convert(str(source), target, dtype="auto", **how)
    except QuickSilverError:
        if not is_whole(target):  # else another process was faster
            raise
        return target
    for note in notes if shows else ():
        print(f"note: {note}", file=sys.stderr)
    return target


def _cache_name(source: str, revision: str | None) -> str:
    """A folder's name for one version of a source: `org--name@revision`, or `name@hash`."""
    path = Path(source)
    if source != "embedded" and not path.exists():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) or path.suffix == ".gguf":
            raise CheckpointError(f"{source} is not a folder, a .gguf file or a hub id (org/name).")
        return source.replace("/", "--") + (f"@{quote(revision, safe='')}" if revision else "")
    if revision is not None:
        raise ConfigError(f"{source} is no hub id: only a model of the Hub has a revision.")
    if source == "embedded":
        return source
    path = path.resolve()
    files = [path] if path.is_file() else sorted(path.glob("[!.]*"))  # no hidden ones
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    seen = [str(path), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
    digest = hashlib.sha256(repr(seen).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{path.name.removesuffix('.gguf')[:64]}@{digest[:12]}"


def _with_codes(layers: Params, file: Path) -> Params:
    """Layers with the codes of a GGUF file in place of the projections that it has."""
    from safetensors.numpy import load_file

    parts: dict[str, dict[str, jax.Array]] = {}
    for name, array in load_file(file).items():
        projection, _, part = name.partition(".")
        parts.setdefault(projection, {})[part] = jnp.asarray(array)
    layers = dict(layers)
    for name, codes in parts.items():
        # Two 4-bit codes are in an unsigned byte.
        bits = 4 if codes["codes"].dtype == jnp.uint8 else 8
        layers[name] = layers[name] | {"kernel": QKernel(**codes, bits=bits)}
    return layers


def memory_of(model: ModelConfig, weights: Any = None) -> int:
    """Bytes of the parameters as `load` gives them: floats, "int8", or a file of GGUF codes."""
    shapes = abstract_params(model)
    if weights == "int8":
        shapes = jax.eval_shape(in_int8, shapes)
    elif weights is not None:
        codes = jax.eval_shape(lambda: _with_codes(shapes["layers"], weights))
        shapes = {**shapes, "layers": codes}
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


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


def _restore(path: Path, model: ModelConfig, mesh: Mesh | None) -> Params:
    """The parameters in the model's dtype, on the default device or as `shard` cuts them."""
    import orbax.checkpoint as ocp  # slow to import

    logging.getLogger("absl").setLevel(logging.ERROR)

    def place(key_path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if mesh is None:
            return leaf.update(sharding=SingleDeviceSharding(jnp.zeros(()).device))
        return leaf.update(sharding=sharding_of(key_path, leaf.shape, mesh))

    target = jax.tree_util.tree_map_with_path(place, abstract_params(model))
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path.resolve() / PARAMS, args=args)
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        if explain(error) is not None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is damaged: {reason} Convert again.") from error


def find_maps(
    cfg: Config, ckpt: Path, given: Path | None = None, preset: str = ""
) -> tuple[KVMaps, Path] | tuple[None, None]:
    """The maps of the configuration's halting layers and their file, if its policy reads any.

    Args:
      cfg: Its `kv_skip.policy` decides.
      ckpt: Checkpoint, as `load` takes it: its maps are taken unless the preset has its own, beside
        its file or in the library; then those of `balanced`.
      given: Another file, or None.
      preset: Name, or file beside which `calibrate` writes its maps.

    Raises:
      CheckpointError: There is no such file.
      ConfigError: The maps are of other layers, another model or other weights.
      InputError: A file was given though the policy reads none.
    """
    qs = cfg.quicksilver
    if not qs or not qs.halting or not qs.kv_skip or qs.kv_skip.policy != "extrapolate":
        if given is not None:
            raise InputError(f"{given}: KV maps are for kv_skip.policy 'extrapolate' only.")
        return None, None
    ckpt = find_checkpoint(ckpt)
    own = shipped_maps(cfg.model, preset) if preset in ("", *NAMES) else maps_path(Path(preset))
    places = [own, ckpt / FILE_NAME, shipped_maps(cfg.model)]
    path = given or next((place for place in places if place and place.exists()), None)
    path = path or own or ckpt / FILE_NAME
    path = path / FILE_NAME if path.is_dir() else path
    maps = KVMaps.load(path)
    try:
        maps.check(cfg.model)
        return select(maps, qs.halting.layers or ()), path
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
