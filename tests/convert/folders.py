"""Hugging Face folders made without torch, so that conversion is tested where torch is not."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import qs_jax
from convert.errors import ConversionError
from convert.flax_to_hf import hf_tensors
from convert.hf_to_flax import convert
from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError
from qs_jax.models import Params
from qs_jax.testing import tiny_model, tiny_params, toy_tokenizer
from tests.support import LLAMA

LLAMA_CONFIG: dict[str, Any] = LLAMA | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def llama_tensors(seed: int = 0) -> tuple[dict[str, np.ndarray], Params, ModelConfig]:
    model = tiny_model("llama", bos_token_id=0, eos_token_ids=(1,))
    params = jax.tree.map(np.asarray, tiny_params(model, seed))
    return hf_tensors(params, model), params, model


def write_folder(
    folder: Path,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any] | None = None,
    tokenizer: bool = True,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG if config is None else config))
    if tokenizer:
        toy_tokenizer(folder)
    return folder


def assert_same_tree(ours: Params, expected: Params) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def assert_converts(source, out, seed: int = 0, **options):
    """The source becomes the checkpoint of `llama_tensors`; returns its configuration."""
    model, _ = convert(str(source), out, **options)
    params, loaded = qs_jax.load(out)
    assert loaded == model
    assert_same_tree(params, llama_tensors(seed)[1])
    return model


def refused(source, tmp_path, **options):
    """The message of the refusal; asserts that nothing is left behind."""
    tmp_path.mkdir(exist_ok=True)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConversionError) as caught:
        convert(str(source), tmp_path / "out", **options)
    assert sorted(os.listdir(tmp_path)) == before, "nothing may be left behind"
    with pytest.raises(CheckpointError):
        qs_jax.load(tmp_path / "out")
    return str(caught.value)
