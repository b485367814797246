"""`python -m qs_jax info`: the manifest of a converted checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qs_jax.checkpoint import check_codes, read_manifest
from qs_jax.commands.options import print_table
from qs_jax.config import ModelConfig
from qs_jax.load import memory_of


@dataclasses.dataclass
class Info:
    """Print the source, sizes and configuration of a converted checkpoint."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""

    def run(self) -> None:
        """Print the manifest as a table."""
        manifest = read_manifest(self.ckpt)
        rows = {
            "source": manifest["source"],
            "parameters": f"{manifest['num_params']:,}",
            "bytes on disk": f"{manifest['params']['bytes']:,}",
        }
        model = ModelConfig.from_dict(manifest["model"])
        kinds: dict[str, Any] = {"float32": None, "bfloat16": None, "int8": "int8"}
        if "codes" in manifest:
            kinds["gguf"] = check_codes(self.ckpt, manifest)
        for name, codes in kinds.items():
            dtype = name if codes is None else "bfloat16"
            size = memory_of(model.replace(dtype=dtype), codes)
            rows[f"bytes in memory, {name}"] = f"{size:,}"
        print_table(str(self.ckpt), (), (rows | manifest["model"]).items())
