"""The one door to `transformers`, of which only tokenizers are used."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def transformers() -> ModuleType:
    """The package, imported when first needed (it takes seconds), without its advice on torch."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    return transformers


def read_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, without network.

    Raises:
      Exception: Whatever `transformers` raises for files it cannot read.
    """
    return transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
