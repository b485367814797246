"""`python -m qs_jax info`: the manifest of a converted checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qs_jax.checkpoint import read_manifest
from qs_jax.commands.options import print_table


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
        print_table(str(self.ckpt), (), (rows | manifest["model"]).items())
