"""Fetching a model folder from the Hugging Face Hub, or from its local cache when offline."""

from __future__ import annotations

from pathlib import Path

from convert.errors import ConversionError
from convert.sources import TOKENIZER_FILES

_CONFIGS = ["config.json", "generation_config.json"]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


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
