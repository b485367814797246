"""Loading: damage is noticed, dtypes convert, and parameters land on the devices asked for."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import qs_jax
from convert.hf_to_flax import convert
from qs_jax.checkpoint import FORMAT_VERSION
from qs_jax.errors import CheckpointError, ConfigError, NonFiniteError
from qs_jax.load import choose_dtype
from qs_jax.models import cpu
from qs_jax.testing import tiny_model
from tests.convert.folders import llama_tensors, write_folder
from tests.support import random_tokens


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A copy: tests damage it."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "ckpt")


def test_maps_beside_the_weights_come_along(folder):
    params, model = qs_jax.load(folder)
    assert "kv_maps" not in params
    tokens_NT = random_tokens(model, 8, 40)
    qs_jax.fit_kv_maps(params, tokens_NT, (1,), model, features=("state",)).save(folder)
    params, _ = qs_jax.load(folder)
    assert params["kv_maps"].layers == (1,)


@pytest.mark.parametrize("damage", ["lost", "zeros", "one bit"])
def test_damaged_files_are_noticed(folder, damage):
    chunk = next(path for path in (folder / "params").rglob("*") if path.name == "0.0.0")
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.unlink()
    if damage != "lost":
        chunk.write_bytes(bytes(len(content)) if damage == "zeros" else content)
    with pytest.raises(CheckpointError, match="files were lost or changed"):
        qs_jax.load(folder)


def test_files_of_operating_systems_do_not_matter(folder):
    expected, _ = qs_jax.load(folder)
    for name in (".DS_Store", "._0.0.0", "Thumbs.db", ".fuse_hidden0001"):
        for place in (folder, folder / "params", next((folder / "params").glob("layers*"))):
            (place / name).write_bytes(b"x")
    jax.tree.map(np.testing.assert_array_equal, qs_jax.load(folder)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "Convert again"),
        ({"format_version": None}, "Convert again"),
        ({"model": {"model_type": "llama"}}, "damaged"),
        ({"model": [1]}, "damaged"),
        ({"params": None}, "damaged"),
        ({"params": {"files": 3}}, "does not list the files"),
        ({"num_params": ...}, "damaged: it lacks num_params"),
        (f'{{"format_version": {FORMAT_VERSION}}}', "damaged: 'model'"),
        ("{", "damaged"),
    ],
)
def test_manifests_that_cannot_be_used(folder, change, message):
    manifest = folder / "qs_jax.json"
    if isinstance(change, dict):
        content = json.loads(manifest.read_text()) | change
        change = json.dumps({name: value for name, value in content.items() if value is not ...})
    manifest.write_text(change)
    with pytest.raises(CheckpointError, match=message):
        qs_jax.load(folder)


def test_weights_that_are_not_finite(tmp_path, monkeypatch):
    from convert import hf_to_flax

    monkeypatch.setattr(hf_to_flax.np, "isfinite", lambda array: np.ones(array.shape, bool))
    tensors = llama_tensors()[0]
    tensors["model.layers.1.mlp.up_proj.weight"][2, 2] = np.inf
    convert(str(write_folder(tmp_path / "hf", tensors)), tmp_path / "ckpt")
    with pytest.raises(NonFiniteError, match="gate_up"):
        qs_jax.load(tmp_path / "ckpt")


def test_dtype_on_the_way_in(tiny_checkpoint):
    exact, model = qs_jax.load(tiny_checkpoint)
    half, half_model = qs_jax.load(tiny_checkpoint, dtype="bfloat16")
    assert (model.dtype, half_model.dtype) == ("float32", "bfloat16")
    for ours, theirs in zip(jax.tree.leaves(half), jax.tree.leaves(exact), strict=True):
        np.testing.assert_array_equal(ours, theirs.astype("bfloat16"))
    with pytest.raises(ConfigError, match="dtype must be 'float32', 'bfloat16' or"):
        qs_jax.load(tiny_checkpoint, dtype="float8")


@pytest.mark.parametrize(
    ("platform", "detail", "expected"),
    [
        ("cpu", "flags : avx512f avx512_bf16 avx512_vnni", "bfloat16"),
        ("cpu", "flags : avx512f avx512_vnni", "float32"),
        ("cpu", None, "float32"),  # not Linux
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "10.0", "bfloat16"),
        ("gpu", "7.5", "float32"),  # a T4 multiplies no bfloat16
        ("gpu", "gfx942", "bfloat16"),  # AMD's names are not numbers
        ("tpu", "", "bfloat16"),
    ],
)
def test_the_default_dtype_is_the_faster(tmp_path, monkeypatch, platform, detail, expected):
    if platform == "cpu" and detail:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{detail}\n\n", encoding="utf-8")
    monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "cpuinfo")
    cpu.processor_multiplies.cache_clear()
    device = SimpleNamespace(platform=platform, compute_capability=detail)
    stored = tiny_model(dtype="bfloat16")
    assert choose_dtype("auto", stored, device) == expected
    assert choose_dtype(None, stored, device) == "bfloat16"
    assert choose_dtype("float32", stored, device) == "float32"
    cpu.processor_multiplies.cache_clear()


@pytest.mark.parametrize(
    ("count", "data", "weights"),
    [
        (2, None, None),
        pytest.param(4, None, None, marks=pytest.mark.slow),
        pytest.param(2, 2, None, marks=pytest.mark.slow),
        pytest.param(2, 2, "int8", marks=pytest.mark.slow),
    ],
)
def test_parameters_are_sharded_over_devices(tiny_checkpoint, count, data, weights):
    """Matrices are cut, nothing is lost, and the model computes the same."""
    devices = jax.devices()[:count] if data is None else qs_jax.make_mesh(data, count)
    everywhere = set(jax.devices()[: count * (data or 1)])
    params, model = qs_jax.load(tiny_checkpoint, devices=devices, weights=weights)
    whole, _ = qs_jax.load(tiny_checkpoint, weights=weights)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    kernel = jax.tree.leaves(params["layers"]["gate_up"]["kernel"])[0]
    assert {shard.device for shard in kernel.addressable_shards} == everywhere
    for shard in kernel.addressable_shards:
        assert shard.data.size == kernel.size // count
    cfg = qs_jax.Config(model=model, max_new_tokens=8)
    tokens_BT = random_tokens(model)
    expected = qs_jax.score(whole, tokens_BT, cfg).logprobs
    np.testing.assert_allclose(qs_jax.score(params, tokens_BT, cfg).logprobs, expected, atol=1e-4)
    out = qs_jax.generate(params, tokens_BT, cfg)
    np.testing.assert_array_equal(out.tokens, qs_jax.generate(whole, tokens_BT, cfg).tokens)
