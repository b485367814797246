"""Conversion streams."""

import subprocess
import sys

import pytest

from qs_jax.checkpoint import read_manifest
from qs_jax.config import ModelConfig
from qs_jax.models import count_params

CONVERT = """
import sys
from pathlib import Path
from convert.hf_to_flax import convert

convert(sys.argv[1], sys.argv[2], tokenizer=False)
# VmHWM: unlike ru_maxrss it does not begin with the parent's memory.
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
def test_converting_two_gigabytes_needs_less_than_1_4_of_their_size(tmp_path):
    """A random Llama in float32; the process's peak resident memory, Python and JAX included."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 9}
    config = LlamaConfig(**sizes, num_key_value_heads=8, max_position_embeddings=2048)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf", max_shard_size="300MB")
    command = [sys.executable, "-c", CONVERT, str(tmp_path / "hf"), str(tmp_path / "ours")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    model = ModelConfig.from_dict(read_manifest(tmp_path / "ours")["model"])
    size = 4 * count_params(model)
    assert size >= 2e9
    assert 1024 * int(found.stdout.split()[-1]) / size < 1.4
