"""What a measurement was made with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from qs_jax.halves import CPU_INFO

RESULTS = Path(__file__).with_name("results")
_PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "tensorstore", "safetensors", "numpy")


def commit() -> str | None:
    """Short hash of the working tree's commit."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def processor() -> str:
    """Name of the processor, with the numbers that tell generations of one name apart."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    # The last of the processors; they are alike.
    found = {
        name.strip(): value.strip() for name, _, value in (row.partition(":") for row in lines)
    }
    name = found.get("model name") or platform.processor()
    numbers = [(key, found.get(f"{cpu}{key}")) for cpu, key in (("cpu ", "family"), ("", "model"))]
    return ", ".join([name, *(f"{key} {value}" for key, value in numbers if value)])


def describe() -> dict[str, Any]:
    """Versions, processor, cores and commit of this run."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }


def read(path: Path, about: dict[str, Any], empty: dict[str, Any]) -> dict[str, Any]:
    """What a stopped run found, or `empty`; a file of another run is not gone on with."""
    if not path.exists():
        return empty
    content = json.loads(path.read_text())
    if content["about"] != about:
        raise SystemExit(f"{path} holds other measurements ({content['about']}): move it away.")
    return content


def write(name: str, result: dict[str, Any], out: Path | None = None) -> Path:
    """Write a result with its environment as JSON; returns the file."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | {"environment": describe()}, indent=2) + "\n")
    return path
