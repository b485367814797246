"""What a measurement was made with, and the files that hold measurements."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from qs_jax.checkpoint import read_manifest
from qs_jax.config import Config
from qs_jax.evaluation.perplexity import git_hash
from qs_jax.files import check_targets, read_json, write_json
from qs_jax.load import find_checkpoint, find_maps
from qs_jax.models import Params

RESULTS = Path(__file__).with_name("results")
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy")


def commit() -> str | None:
    """Short hash of the library's commit."""
    return (git_hash() or "")[:7] or None


def processor() -> str:
    """Name of the processor, with the numbers that tell generations of one name apart."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    # The last of the processors; they are alike.
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = fields.get("model name") or platform.processor()
    numbers = {"family": fields.get("cpu family"), "model": fields.get("model")}
    return ", ".join([name, *(f"{key} {value}" for key, value in numbers.items() if value)])


def describe() -> dict[str, Any]:
    """Versions, processor, cores and commit of this run."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }


def check_out(path: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    check_targets([("--out", path)], overwrite=True, makes=path.parent)


def read(path: Path, about: dict[str, Any], empty: dict[str, Any]) -> dict[str, Any]:
    """What a stopped run has measured, or `empty`; a file of another run is refused."""
    check_out(path)
    if not path.exists():
        return empty
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["about"] != json.loads(json.dumps(about)):
        raise SystemExit(f"{path} holds other measurements ({content['about']}): move it away.")
    return content


def result(name: str) -> Any:
    """A result file; None where its command has not been run."""
    path = RESULTS / f"{name}.json"
    return read_json(path) if path.exists() else None


def write(name: str, result: dict[str, Any], out: Path | None = None) -> Path:
    """Write a result with its environment as JSON; returns the file."""
    path = out or RESULTS / f"{name}.json"
    write_json(path, result | {"environment": describe()})
    return path


def run_command(name: str, arguments: Any, run: Callable[[Any], None], argv: Any) -> None:
    """Parse the options of a command and run it."""
    run(tyro.cli(arguments, prog=f"python -m benchmarks.{name}", args=argv))


def attach_maps(params: Params, cfg: Config, ckpt: Path, preset: str = "") -> Params:
    """The parameters, with the maps that a preset reads, if it reads any."""
    maps, _ = find_maps(cfg, ckpt, None, preset)
    return params if maps is None else {**params, "kv_maps": maps}


def source_of(ckpt: Path) -> str:
    """What a checkpoint was converted from."""
    return read_manifest(find_checkpoint(ckpt))["source"]


def random_tokens(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Token ids `[batch, length]`, the same every time."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length), np.int32)
