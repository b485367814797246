"""Perplexity of a converted checkpoint here and in Hugging Face torch, on the same weights.

`python -m benchmarks.parity --ckpt DIR --text FILE` scores the first windows of a text with both,
in float32. Needs torch (the `test` extra).
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import qs_jax
from benchmarks import environment
from convert import flax_to_hf
from qs_jax.checkpoint import read_manifest


@dataclasses.dataclass
class Arguments:
    """Compare perplexities."""

    ckpt: Path
    """Folder written by convert.hf_to_flax."""
    text: Path
    """UTF-8 text, tokenised whole and cut into windows."""
    windows: int = 8
    """Windows scored."""
    seq_len: int = 512
    """Tokens a window."""
    out: Path | None = None
    """JSON file; default benchmarks/results/parity.json."""


def measure(ckpt: Path, text: Path, windows: int = 8, seq_len: int = 512) -> dict[str, Any]:
    """Both perplexities over positions 1.. of each window."""
    import torch
    from transformers import AutoModelForCausalLM

    params, model = qs_jax.load(ckpt, dtype="float32")
    ids = qs_jax.load_tokenizer(ckpt)(text.read_text(encoding="utf-8"), verbose=False).input_ids
    rows = np.array(ids[: windows * seq_len]).reshape(windows, seq_len)
    ours = qs_jax.score(params, rows, qs_jax.Config(model=model)).perplexity
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        exported = flax_to_hf.export(ckpt, Path(folder) / "hf")
        hf = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
        tensors = [torch.tensor(row[None]) for row in rows]
        theirs = float(torch.stack([hf(row, labels=row).loss for row in tensors]).mean().exp())
    return {
        "model": read_manifest(ckpt)["source"],
        "text": text.name,
        "windows": windows,
        "seq_len": seq_len,
        "dtype": "float32",
        "perplexity": ours,
        "hugging_face_perplexity": theirs,
        "versions": {"torch": torch.__version__},
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.parity", args=argv)
    result = measure(args.ckpt, args.text, args.windows, args.seq_len)
    path = environment.write("parity", result, args.out)
    print(
        f"perplexity {result['perplexity']:.4f}, Hugging Face "
        f"{result['hugging_face_perplexity']:.4f}; {path}"
    )


if __name__ == "__main__":
    main()
