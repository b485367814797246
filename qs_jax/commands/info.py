"""`python -m qs_jax info`: the manifest of a converted checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from qs_jax.checkpoint import check_codes, read_manifest
from qs_jax.commands.options import print_table
from qs_jax.config import ModelConfig
from qs_jax.load import find_checkpoint, memory_of


@dataclasses.dataclass
class Info:
    """Print the source, sizes and configuration of a checkpoint."""

    ckpt: Path
    """As the other commands take it."""
    revision: str | None = None
    """Of a hub id: branch, tag or commit."""

    def run(self) -> None:
        """Print the manifest as a table."""
        folder = find_checkpoint(self.ckpt, self.revision)
        manifest = read_manifest(folder)
        rows = {name: manifest[name] for name in ("source", "revision") if name in manifest}
        rows |= {
            "folder": folder,
            "parameters": f"{manifest['num_params']:,}",
            "bytes on disk": f"{manifest['params']['bytes']:,}",
        }
        model = ModelConfig.from_dict(manifest["model"])
        kinds: dict[str, Any] = {"float32": None, "bfloat16": None, "int8": "int8"}
        if "codes" in manifest:
            kinds["gguf"] = check_codes(folder, manifest)
        for name, codes in kinds.items():
            dtype = name if codes is None else "bfloat16"
            size = memory_of(model.replace(dtype=dtype), codes)
            rows[f"bytes in memory, {name}"] = f"{size:,}"
        print_table(str(self.ckpt), (), (rows | manifest["model"]).items())
