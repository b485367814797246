"""The files of a converted checkpoint folder, as `convert.hf_to_flax` writes them.

qs_jax.json is the manifest (format version, ModelConfig with the fingerprint of the weights,
provenance) and comes last; params/ is an Orbax checkpoint of the stacked tree; config.json and the
tokenizer's files are as they came. Of a GGUF file, gguf_codes.safetensors holds the codes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError, InputError
from qs_jax.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST = "qs_jax.json"
PARAMS = "params"
CODES = "gguf_codes.safetensors"  # those of a GGUF file, where the checkpoint was made from one
FORMAT_VERSION = 2


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
        manifest = read_json(file)
        if (version := manifest["format_version"]) != FORMAT_VERSION:
            raise ValueError(f"its format is {version}, this library reads {FORMAT_VERSION}")
        ModelConfig.from_dict(manifest["model"])
        if missing := {"num_params", "params", "source"} - set(manifest):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if not {"files", "bytes", "crc32"} <= set(manifest["params"]):
            raise ValueError("it does not list the files of the parameters")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Convert again.") from error
    return manifest


def checksum(folder: Path) -> dict[str, Any]:
    """Names of all files below a folder, their bytes, and one CRC-32 over names and contents."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [path.as_posix() for path in files]
    return {"files": names} | _checksum_files(folder, names)


def check_params_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError where files of the parameters were lost or changed.

    Only files that the conversion wrote count: operating systems and tools add files of their own.
    """
    folder, known = folder / PARAMS, manifest["params"]
    lost = [name for name in known["files"] if not (folder / name).is_file()]
    if lost or known != {"files": known["files"]} | _checksum_files(folder, known["files"]):
        example = f", such as {lost[0]}" if lost else ""
        raise CheckpointError(
            f"{folder}: files were lost or changed{example}. Delete them and convert again."
        )


def is_whole(folder: Path) -> bool:
    """Whether a folder is a converted checkpoint whose parameters have the bytes that they had.

    Their contents are not read; `check_params_files` does so.
    """
    try:
        known = read_manifest(folder)["params"]
        sizes = [(folder / PARAMS / name).stat().st_size for name in known["files"]]
    except (CheckpointError, OSError, TypeError):
        return False
    return sum(sizes) == known["bytes"]


def checksum_codes(folder: Path) -> dict[str, int]:
    """Bytes and CRC-32 of the codes of a GGUF file."""
    return _checksum_files(folder, [CODES])


def check_codes(folder: Path, manifest: dict[str, Any]) -> Path:
    """The file of the codes of a GGUF file; CheckpointError where there is none, or another."""
    if "codes" not in manifest:
        raise CheckpointError(
            f"{folder} has no codes of a GGUF file: convert a .gguf file whose projections are of "
            "type Q4_0, Q4_1 or Q8_0 with this version."
        )
    if not (folder / CODES).is_file() or checksum_codes(folder) != manifest["codes"]:
        raise CheckpointError(f"{folder / CODES} was lost or changed. Convert again.")
    return folder / CODES


def _checksum_files(folder: Path, names: Iterable[str]) -> dict[str, int]:
    total = crc = 0
    for name in names:
        crc = zlib.crc32(name.encode(), crc)
        with (folder / name).open("rb") as file:
            while block := file.read(2**24):
                crc = zlib.crc32(block, crc)
                total += len(block)
    return {"bytes": total, "crc32": crc}


def transformers() -> ModuleType:
    """The package, imported when first needed (it takes seconds), without its advice on torch.

    Raises:
      InputError: It is not installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        reason = "text needs transformers: pip install 'qs-jax[text]'. Token ids work without it."
        raise InputError(reason) from error
    return transformers


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, without network; raises whatever `transformers` raises.

    A tokenizer.json is obeyed to the letter. tokenizer_config.json only says which of its tokens
    are special and holds the chat template: its class, added tokens and clean-up do not count.
    """
    library, file = transformers(), Path(folder) / "tokenizer.json"
    kind = library.PreTrainedTokenizerFast if file.is_file() else library.AutoTokenizer
    tokenizer = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, library.PreTrainedTokenizerFast):
        raise TypeError(f"{type(tokenizer).__name__} is not based on the tokenizers library")
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer._tokenizer = Tokenizer.from_file(str(file))  # without what the config added
        known = tokenizer.get_vocab()
        for name, token in tokenizer.special_tokens_map.items():
            if isinstance(token, str) and token not in known:
                setattr(tokenizer, name, None)
        extra = tokenizer.extra_special_tokens
        tokenizer.extra_special_tokens = [token for token in extra if token in known]
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.clean_up_tokenization_spaces = tokenizer.split_special_tokens = False
    return tokenizer
