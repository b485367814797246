"""Peak memory of a conversion, against the size of what it writes.

`python -m benchmarks.convert_memory [--gigabytes 2]` makes a Hugging Face folder of random Llama
weights, converts it in a process of its own, and reports that process's peak resident memory.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from safetensors.numpy import save_file

from benchmarks import environment
from convert import mapping
from convert.errors import Problems
from convert.hf_config import model_config
from qs_jax.models import count_params

_CHILD = textwrap.dedent(
    """
    import json, sys, time
    from pathlib import Path
    from convert.hf_to_flax import convert

    def peak_memory():  # VmHWM: unlike ru_maxrss it does not begin with the parent's memory
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    idle = peak_memory()
    began = time.perf_counter()
    convert(sys.argv[1], sys.argv[2], tokenizer=False)
    peak = peak_memory()
    print(json.dumps({"seconds": time.perf_counter() - began, "idle": idle, "peak": peak}))
    """
)


@dataclasses.dataclass
class Arguments:
    """Measure the peak memory of converting a random Llama checkpoint."""

    gigabytes: float = 2.0
    """Least size of the float32 checkpoint."""
    out: Path | None = None
    """JSON file; default benchmarks/results/convert_memory.json."""


def llama_config(gigabytes: float) -> dict[str, Any]:
    """A Llama shape of at least that many gigabytes in float32."""
    config = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    while _bytes(config) < gigabytes * 1e9:
        config["num_hidden_layers"] += 1
    return config


def _bytes(config: dict[str, Any]) -> int:
    model, _ = model_config(config, "float32", Problems())
    assert model is not None
    return 4 * count_params(model)


def write_source(folder: Path, config: dict[str, Any]) -> None:
    """Random weights, one safetensors file a layer, with an index."""
    model, _ = model_config(config, "float32", Problems())
    assert model is not None
    table, rng, weight_map = mapping.table_of(model), np.random.default_rng(0), {}
    for layer in range(-1, model.num_layers):
        tensors = {
            table.full_name(rule.name.format(layer=layer)): rng.standard_normal(
                rule.shape, np.float32
            )
            for rule in table.rules
            if rule.per_layer == (layer >= 0)
        }
        file = f"model-{layer + 1:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def measure(gigabytes: float) -> dict[str, Any]:
    """Convert a fresh random checkpoint; sizes in bytes, times in seconds."""
    config = llama_config(gigabytes)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "hf"
        source.mkdir()
        print(f"writing {_bytes(config) / 1e9:.2f} GB of random weights ...", file=sys.stderr)
        write_source(source, config)
        print("converting ...", file=sys.stderr)
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, str(source), str(Path(name) / "ours")],
            capture_output=True,
            text=True,
            check=True,
        )
    seen = json.loads(child.stdout.splitlines()[-1])
    size = _bytes(config)
    return {
        "layers": config["num_hidden_layers"],
        "checkpoint_bytes": size,
        "peak_bytes": seen["peak"],
        "idle_bytes": seen["idle"],
        "peak_over_checkpoint": seen["peak"] / size,
        "seconds": seen["seconds"],
    }


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    args = tyro.cli(Arguments, prog="python -m benchmarks.convert_memory", args=argv)
    result = measure(args.gigabytes)
    path = environment.write("convert_memory", result, args.out)
    print(
        f"checkpoint {result['checkpoint_bytes'] / 1e9:.2f} GB, peak memory "
        f"{result['peak_bytes'] / 1e9:.2f} GB ({result['peak_over_checkpoint']:.2f} x), of which "
        f"{result['idle_bytes'] / 1e9:.2f} GB before converting; {result['seconds']:.0f} s; {path}"
    )


if __name__ == "__main__":
    main()
