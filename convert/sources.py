"""Checkpoints to convert: their configuration, and each tensor when it is needed."""

from __future__ import annotations

import functools
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.errors import ConversionError
from qs_jax.files import read_json

TOKENIZER_FILES = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json
    merges.txt tokenizer.model chat_template.jinja chat_template.json
    """.split()
# Any one of these sets is a tokenizer. A SentencePiece model alone is not: how text begins (space,
# beginning token) stands in the config, and transformers guesses it wrong without.
_TOKENIZER_SETS = (
    {"tokenizer.json"},
    {"tokenizer.model", "tokenizer_config.json"},
    {"vocab.json", "merges.txt"},
)
# Where transformers' from_pretrained looks for weights, in its order.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What else holds weights, for messages.
_WEIGHT_SUFFIXES = ".bin .ckpt .gguf .h5 .json .msgpack .npz .pt .pth .safetensors".split()
_ADAPTER = "adapter_config.json"
_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


class Codes(NamedTuple):
    """A matrix `[O, C]` in groups of 32 input channels: scale * code + offset.

    Attributes:
      codes: int8 `[O, C]`, or uint8 `[O, C / 2]`: two 4-bit codes in a byte, the first half of a
        group in the low bits.
      scale: float16 `[O, C / 32]`.
      offset: The same, or None where it is 0.
    """

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None

    def each(self, function: Callable[[np.ndarray], np.ndarray]) -> Codes:
        """With a function of rows applied to each array."""
        offset = None if self.offset is None else function(self.offset)
        return Codes(function(self.codes), function(self.scale), offset)


class StoredTensor(NamedTuple):
    """A tensor that has not been read yet; the dtype is NumPy's name, else the format's.

    `codes` reads what a quantised one is stored as; None where it is not, or in another form.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]
    codes: Callable[[], Codes] | None = None


class Source(NamedTuple):
    """A checkpoint to convert, with the configurations and tensor names of Hugging Face.

    The description is for messages and provenance. `generation_config` is empty where there is
    none. `write_tokenizer` puts the tokenizer's files into a folder and returns notes for the user,
    as `notes` are. The revision is the commit of a hub model.
    """

    description: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    write_tokenizer: Callable[[Path], list[str]]
    notes: list[str]
    revision: str | None = None


def open_folder(folder: Path, description: str | None = None) -> Source:
    """Open a folder with `config.json` and safetensors or PyTorch weights, sharded or not."""
    if (folder / _ADAPTER).is_file():
        raise ConversionError(
            f"{folder} holds an adapter ({_ADAPTER}), which changes the weights of its base model. "
            "Merge the two (merge_and_unload of peft) and convert the result."
        )
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} has no config.json: not a Hugging Face model folder.")
    config, generation = read_object(folder / "config.json"), folder / "generation_config.json"
    tensors, notes = _tensors_of(folder)
    return Source(
        description or str(folder),
        config,
        read_object(generation) if generation.is_file() else {},
        tensors,
        functools.partial(_copy_tokenizer, folder),
        notes,
    )


def download(repo_id: str, revision: str | None = None) -> Path:
    """Fetch config, tokenizer and the weights that `open_folder` reads of a hub model.

    The folder is named after the commit.
    """
    from huggingface_hub import snapshot_download

    def fetch(*names: str) -> Path:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(names)))

    try:
        folder = fetch("config.json", "generation_config.json", _ADAPTER, *TOKENIZER_FILES)
        for name in _WEIGHTS:
            if (fetch(name) / name).is_file():
                if name.endswith(".index.json"):
                    fetch(*map(str, _weight_map(folder / name).values()))
                break
        return folder
    except ConversionError:
        raise
    except Exception as error:  # huggingface_hub and its HTTP client raise many kinds
        raise ConversionError(
            f"{repo_id} is no file or folder here, and could not be fetched from the Hub "
            f"({type(error).__name__}: {error}). Check the name, the connection, and `hf auth "
            "login` for gated models; or download it elsewhere and give the folder."
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _copy_tokenizer(source: Path, folder: Path) -> list[str]:
    present = {name for name in TOKENIZER_FILES if (source / name).is_file()}
    if not any(needed <= present for needed in _TOKENIZER_SETS):
        sets = ", or ".join(" with ".join(sorted(needed)) for needed in _TOKENIZER_SETS)
        advice = "Add it, or leave it out: convert.hf_to_flax --no-tokenizer."
        raise ConversionError(f"{source} has no tokenizer ({sets}). {advice}")
    for name in present:
        shutil.copyfile(source / name, folder / name)
    return []


def _tensors_of(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Every tensor that transformers would read by default, and a note on weights it would not."""
    first, *others = [name for name in _WEIGHTS if (folder / name).is_file()] or [""]
    if not first:
        has = [path.name for path in sorted(folder.iterdir()) if path.suffix in _WEIGHT_SUFFIXES]
        raise ConversionError(
            f"{folder} has no weights that transformers reads by default "
            f"({', '.join(_WEIGHTS)}); it has {', '.join(has[:8]) or 'none at all'}."
        )
    headers = _safetensors if first.startswith("model.") else _torch_file
    read = _sharded if first.endswith(".index.json") else lambda path, headers: headers(path)
    unread = f"weights are those of {first}, as in transformers; {', '.join(others)} is not read"
    return read(folder / first, headers), [unread] * bool(others)


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map.")
    return weight_map


def _sharded(
    index: Path, headers: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Every tensor of the files that an index lists."""
    weight_map = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for file in dict.fromkeys(map(str, weight_map.values())):
        path = index.parent / file
        if path.parent != index.parent:
            raise ConversionError(f"{index} points outside its folder: {file}")
        if not path.is_file():
            raise ConversionError(f"{path} is missing, but {index.name} lists it.")
        stored = headers(path)
        listed = {name for name, where in weight_map.items() if str(where) == file}
        if absent := sorted(listed - set(stored)):
            raise ConversionError(f"{path} lacks {', '.join(absent)}, which the index lists.")
        if twice := sorted(set(stored) & set(tensors)):
            raise ConversionError(f"{path} and another file both hold {', '.join(twice)}.")
        tensors |= stored
    return tensors


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    with _open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            header, read = file.get_slice(name), functools.partial(_read_safetensors, path, name)
            shape, dtype = tuple(header.get_shape()), str(header.get_dtype())
            tensors[name] = StoredTensor(shape, _SAFETENSORS_DTYPES.get(dtype, dtype), read)
    return tensors


def _read_safetensors(path: Path, name: str) -> np.ndarray:
    with _open_safetensors(path) as file:  # anew for every tensor: its pages do not stay mapped
        return file.get_tensor(name)


def _open_safetensors(path: Path) -> Any:
    path.open("rb").close()  # a file without permission to read raises its own error
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        hint = " It is a Git LFS pointer: run `git lfs pull`." if _is_lfs_pointer(path) else ""
        problem = f"{path} is truncated or not a safetensors file: {error}.{hint}"
        raise ConversionError(problem) from error


def _is_lfs_pointer(path: Path) -> bool:
    """Whether Git LFS put this small text in the file's place."""
    with path.open("rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _torch_file(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    for name, tensor in _load_torch(path).items():
        dtype, read = str(tensor.dtype), functools.partial(_read_torch, path, name)
        tensors[name] = StoredTensor(tuple(tensor.shape), dtype.removeprefix("torch."), read)
    return tensors


def _read_torch(path: Path, name: str) -> np.ndarray:
    tensor = _load_torch(path)[name].detach()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy has none; float32 holds it exactly
        tensor = tensor.float()
    return np.array(tensor.numpy())


def _load_torch(path: Path) -> dict[str, Any]:
    """A PyTorch `.bin` file, memory-mapped where its format can be; no code in it is run."""
    try:
        import torch
    except ImportError as error:
        raise ConversionError(
            f"{path} needs torch (a CPU build will do), and torch is not installed."
        ) from error
    mapped = zipfile.is_zipfile(path)  # PyTorch's own format since 1.6
    try:
        loaded = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise ConversionError(f"{path} is damaged or not a PyTorch file: {error}") from error
    tensors = loaded.values() if isinstance(loaded, dict) else [None]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise ConversionError(f"{path} is not a plain dictionary of tensors.")
    return loaded
