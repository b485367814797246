"""Where tensors come from: one at a time, in any order, without holding the file in memory."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from convert.errors import ConversionError
from convert.mapping import Shape

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_CONFIGS = ["config.json", "generation_config.json"]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]
# Any one of these sets is a tokenizer. A SentencePiece model alone is not: how text begins (space,
# beginning token) stands in the config, and transformers guesses it wrong without.
_TOKENIZER_SETS = (
    {"tokenizer.json"},
    {"tokenizer.model", "tokenizer_config.json"},
    {"vocab.json", "merges.txt"},
)


@runtime_checkable
class Source(Protocol):
    """A checkpoint in someone else's format.

    Attributes:
      description: What it is, for messages and provenance.
      config: As in a Hugging Face `config.json`.
      generation_config: As in `generation_config.json`; empty when there is none.
      shapes: Shape of every tensor, under Hugging Face names.
      dtypes: NumPy name of the dtype of every tensor, or the format's own where NumPy has none.
    """

    description: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    shapes: dict[str, Shape]
    dtypes: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in memory of its own."""
        ...

    def write_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer files into `folder`; ConversionError if there is none."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ConversionError: Not readable, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


class HuggingFaceFolder:
    """A local folder with `config.json` and safetensors or PyTorch weights, sharded or not."""

    def __init__(self, folder: Path, description: str | None = None) -> None:
        if not (folder / "config.json").is_file():
            raise ConversionError(f"{folder} has no config.json: not a Hugging Face model folder.")
        self.folder = folder
        self.description = description or str(folder)
        self.config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._reader, files = _weights_of(folder)
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        for path, expected in files.items():
            found = self._reader.headers(path)
            if absent := sorted((expected or set()) - set(found)):
                raise ConversionError(f"{path} lacks {', '.join(absent)}, which the index lists.")
            for name, (shape, dtype) in found.items():
                if name in self.shapes:
                    raise ConversionError(
                        f"{name} is in {self._file_of[name].name} and {path.name}."
                    )
                self._file_of[name], self.shapes[name], self.dtypes[name] = path, shape, dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype it is stored in."""
        return self._reader.read(self._file_of[name], name)

    def write_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer files."""
        present = {name for name in TOKENIZER_FILES if (self.folder / name).is_file()}
        if not any(needed <= present for needed in _TOKENIZER_SETS):
            raise ConversionError(
                f"{self.folder} has no tokenizer (tokenizer.json, tokenizer.model with "
                "tokenizer_config.json, or vocab.json with merges.txt). Add its files, or pass "
                "--no-tokenizer to work with token ids."
            )
        for name in sorted(present):
            (folder / name).write_bytes((self.folder / name).read_bytes())


_SAFETENSORS_DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


class _Safetensors:
    """Opens the file anew for every tensor, so that pages already read do not stay mapped."""

    def headers(self, path: Path) -> dict[str, tuple[Shape, str]]:
        with _open_safetensors(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: (tuple(one.get_shape()), _SAFETENSORS_DTYPES.get(kind, kind))
                for name, one in slices.items()
                for kind in [str(one.get_dtype())]
            }

    def read(self, path: Path, name: str) -> np.ndarray:
        with _open_safetensors(path) as file:
            return file.get_tensor(name)


def _open_safetensors(path: Path):
    from safetensors import SafetensorError, safe_open

    path.open("rb").close()  # a file that may not be read says so itself
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is truncated or not a safetensors file: {error}") from error


class _TorchPickle:
    """PyTorch `.bin` files, memory-mapped, weights only (no code is run)."""

    def __init__(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise ConversionError(
                "these weights are PyTorch .bin files, and torch is not installed: install torch "
                "(a CPU build will do), or convert the model to safetensors."
            ) from error
        self._torch = torch

    def _load(self, path: Path) -> dict[str, Any]:
        # Only the zip format, PyTorch's own since 1.6, can be memory-mapped.
        mapped = zipfile.is_zipfile(path)
        try:
            loaded = self._torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        except Exception as error:  # torch raises many kinds for damaged files
            raise ConversionError(f"{path} is damaged or not a PyTorch file: {error}") from error
        tensor = self._torch.Tensor
        if not isinstance(loaded, dict) or not all(isinstance(v, tensor) for v in loaded.values()):
            raise ConversionError(f"{path} is not a plain dictionary of tensors.")
        return loaded

    def headers(self, path: Path) -> dict[str, tuple[Shape, str]]:
        return {
            name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._load(path).items()
        }

    def read(self, path: Path, name: str) -> np.ndarray:
        tensor = self._load(path)[name].detach()
        if tensor.dtype == self._torch.bfloat16:  # NumPy has no bfloat16; float32 holds it exactly
            tensor = tensor.float()
        return np.array(tensor.numpy())


def _weights_of(folder: Path) -> tuple[_Safetensors | _TorchPickle, dict[Path, set[str] | None]]:
    """The reader, and each weight file with the tensors that an index says it holds."""
    for stem, reader in (("model.safetensors", _Safetensors), ("pytorch_model.bin", _TorchPickle)):
        index, single = folder / f"{stem}.index.json", folder / stem
        if index.is_file():
            return reader(), _indexed_files(index)
        if single.is_file():
            return reader(), {single: None}
    raise ConversionError(
        f"{folder} has no weights (model.safetensors, pytorch_model.bin, or their .index.json)."
    )


def _indexed_files(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map.")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise ConversionError(
                f"{index}: weight_map of {name} must be a file name, got {file!r}."
            )
        path = index.parent / file
        if path.parent != index.parent:
            raise ConversionError(f"{index} points outside its folder: {file}")
        if not path.is_file():
            raise ConversionError(f"{path} is missing, but {index.name} lists it.")
        expected = files.setdefault(path, set())
        assert expected is not None
        expected.add(name)
    return files


def download(repo_id: str, revision: str | None = None) -> Path:
    """A local folder with a hub model: config, tokenizer, and safetensors (else .bin) weights.

    Args:
      repo_id: Such as "meta-llama/Llama-2-7b-hf".
      revision: Branch, tag or commit; None is the default branch.

    Raises:
      ConversionError: Unknown or gated repository, no network and not in the cache.
    """
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch([*_CONFIGS, *TOKENIZER_FILES, *_SAFETENSORS])
        if not any(folder.glob("model*.safetensors")):
            folder = fetch([*_CONFIGS, *TOKENIZER_FILES, *_PICKLES])
    except Exception as error:  # huggingface_hub and its HTTP client raise many kinds
        raise ConversionError(
            f"{repo_id} is no folder here, and could not be fetched from the Hub as a model id "
            f"({type(error).__name__}: {error}). "
            "Check the name, your connection, and `hf auth login` for gated models; or download it "
            "elsewhere and give the folder."
        ) from error
    return folder
