"""Folders in, checkpoints out; what is wrong is said clearly, with nothing written."""

import json
import sys

import numpy as np
import pytest

import qs_jax
from convert import hf_to_flax
from convert.flax_to_hf import hf_tensors
from convert.hf_to_flax import convert
from qs_jax.errors import CheckpointError
from qs_jax.testing import tiny_model, tiny_params
from tests.convert.folders import (
    LLAMA_CONFIG,
    assert_converts,
    assert_same_tree,
    llama_tensors,
    refused,
    write_folder,
)

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4}


def test_a_folder_becomes_a_checkpoint(source, tmp_path, capsys):
    _, expected, model = llama_tensors()
    command = ["--source", str(source), "--out", str(tmp_path / "out")]
    assert hf_to_flax.main(command) == 0
    assert "wrote llama, 0.0 M parameters, 3 layers, float32" in capsys.readouterr().err
    params, loaded = qs_jax.load(tmp_path / "out")
    assert loaded == model
    assert_same_tree(params, expected)
    tokenizer = qs_jax.load_tokenizer(tmp_path / "out")
    assert tokenizer.decode(tokenizer("hello, world").input_ids) == "hello, world"
    assert hf_to_flax.main(command) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert hf_to_flax.main([*command, "--overwrite", "--dtype", "bfloat16"]) == 0
    assert qs_jax.load(tmp_path / "out", dtype=None)[1].dtype == "bfloat16"


def test_the_fingerprint_is_that_of_the_weights(tmp_path, tensors):
    """The same in every dtype and layout of files; another once any tensor changes."""

    def fingerprint(name, tensors, **options):
        model, _ = convert(str(write_folder(tmp_path / name, tensors)), tmp_path / "out", **options)
        assert qs_jax.load(tmp_path / "out")[1].weights == model.weights
        return model.weights

    plain = fingerprint("plain", tensors)
    options = {"overwrite": True, "tokenizer": False}
    assert fingerprint("half", tensors, dtype="bfloat16", **options) == plain
    assert fingerprint("turned", dict(reversed(tensors.items())), **options) == plain
    changed = [
        fingerprint("changed", tensors | {name: 1.1 * tensors[name]}, **options)
        for name in (
            "lm_head.weight",
            "model.norm.weight",
            "model.layers.1.self_attn.v_proj.weight",
        )
    ]
    assert len({plain, *changed}) == len(changed) + 1


def test_sharded_weights_with_an_index(source, tmp_path, tensors):
    from safetensors.numpy import save_file

    (source / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for part in range(3):
        file = f"model-0000{part + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, source / file)
        weight_map |= dict.fromkeys(names[part::3], file)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_converts(source, tmp_path / "out")
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refused(source, tmp_path / "second")


@pytest.mark.hf
def test_pytorch_weights(source, tmp_path, tensors):
    """New files, old files of parameters, and what is refused."""
    torch = pytest.importorskip("torch")
    (source / "model.safetensors").unlink()
    file = source / "pytorch_model.bin"
    plain = {k: torch.tensor(v) for k, v in tensors.items()}
    parameters = {k: torch.nn.Parameter(v) for k, v in plain.items()}
    for stored, zipped in ((plain, True), (parameters, False)):
        torch.save(stored, file, _use_new_zipfile_serialization=zipped)
        assert_converts(source, tmp_path / "out", overwrite=not zipped)
    torch.save({"state_dict": parameters}, file)
    assert "is not a plain dictionary of tensors" in refused(source, tmp_path / "second")
    file.write_bytes(b"PK\x03\x04 not a model")
    assert "damaged or not a PyTorch file" in refused(source, tmp_path / "second")


def test_pytorch_weights_without_torch(source, tmp_path, monkeypatch):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch is not installed" in refused(source, tmp_path)


def test_a_hub_id_resolves_through_the_hub_cache(tmp_path, tensors, monkeypatch):
    """The real client, offline, on a cache laid out as the Hub client lays it out."""
    import huggingface_hub.constants as constants

    commit = "0" * 40
    repo = tmp_path / "cache" / "models--someone--tiny-llama"
    write_folder(repo / "snapshots" / commit, tensors)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert_converts("someone/tiny-llama", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "qs_jax.json").read_text())
    assert manifest["source"] == "someone/tiny-llama (Hugging Face Hub)"
    message = refused("someone/unknown", tmp_path / "second")
    assert "could not be fetched from the Hub" in message


def test_all_tensor_problems_come_in_one_report(tmp_path, tensors):
    broken = dict(tensors)
    del broken["model.layers.1.mlp.up_proj.weight"]
    broken["model.layers.0.self_attn.q_proj.weight"] = np.zeros((32, 31), np.float32)
    broken["model.layers.0.self_attn.q_norm.weight"] = np.zeros(8, np.float32)
    broken["norm.weight"] = broken["model.norm.weight"]
    source = write_folder(tmp_path / "hf", broken, LLAMA_CONFIG | {"sliding_window": 64, "foo": 1})
    message = refused(source, tmp_path)
    for expected in (
        "sliding_window = 64 is not implemented",
        "foo = 1 is not known for llama",
        "missing tensors (1):\n    - layers.1.mlp.up_proj.weight [48, 32]",
        "misshapen tensors (1):\n    - model.layers.0.self_attn.q_proj.weight: [32, 31], expected",
        "ambiguous tensors (1):\n    - model.norm.weight and norm.weight",
        "unmapped tensors (1):\n    - model.layers.0.self_attn.q_norm.weight [8]",
    ):
        assert expected in message


def test_harmless_leftovers_are_ignored(tmp_path, tensors):
    """And the same RoPE scaling in both spellings is fine."""
    more = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    both = {
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    }
    config = LLAMA_CONFIG | {"use_cache": True, "dtype": "float16"} | both
    model = assert_converts(write_folder(tmp_path / "hf", more, config), tmp_path / "out")
    assert model.rope_scaling is not None
    assert model.rope_scaling.factor == 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "xielu"}, "activation 'xielu' is not implemented"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "'longrope' is not implemented"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "alpha": 2}}, "alpha = 2 is not known"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {"factor": 4.0}}, "factor = 4.0 is not known without a rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor = '4' must be a number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": PLAIN_ROPE},
            "rope_parameters and rope_scaling disagree",
        ),
        (
            {"rope_parameters": PLAIN_ROPE | {"rope_theta": 5e5}},
            "rope_theta is given as 500000.0 and 10000.0",
        ),
        ({"rope_theta": 0}, "rope_theta must be greater than 1"),
        ({"rope_theta": "abc"}, "rope_theta = 'abc' must be int or float"),
        ({"rope_scaling": [1, 2]}, "rope_scaling = [1, 2] must be dict"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' must be int or float"),
        ({"hidden_act": ["silu"]}, "hidden_act = ['silu'] must be str"),
        ({"eos_token_id": "2"}, "eos_token_id = '2' must be int or list"),
        ({"attention_bias": 1}, "attention_bias = 1 must be bool"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not implemented"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_kv_heads"),
        ({"num_attention_heads": 5}, "not a multiple of the number of heads"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, tensors, change, message):
    source = write_folder(tmp_path / "hf", tensors, LLAMA_CONFIG | change)
    assert message in refused(source, tmp_path)


def test_special_tokens(tmp_path, tensors):
    """Ids outside the vocabulary are noted; the end tokens of the generation config win."""
    config = LLAMA_CONFIG | {"eos_token_id": [1, 50256], "pad_token_id": -1}
    source = write_folder(tmp_path / "hf", tensors, config)
    model, notes = convert(str(source), tmp_path / "out")
    assert (model.eos_token_ids, model.pad_token_id) == ((1,), None)
    assert len(notes) == 2
    assert "eos_token_id 50256 is outside the vocabulary" in "\n".join(notes)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    model, _ = convert(str(source), tmp_path / "out", overwrite=True)
    assert model.eos_token_ids == (1, 5)


def test_a_tied_head_that_differs_is_refused(tmp_path, tensors):
    tied = LLAMA_CONFIG | {"tie_word_embeddings": True}
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    convert(str(write_folder(tmp_path / "same", same, tied)), tmp_path / "kept")
    assert "head" not in qs_jax.load(tmp_path / "kept")[0]
    other = write_folder(tmp_path / "other", tensors, tied)
    assert "differs from model.embed_tokens.weight" in refused(other, tmp_path)


@pytest.mark.parametrize(
    ("bad", "dtype", "message"),
    [
        (np.nan, "float32", "{} holds NaN or infinite weights."),
        (np.inf, "float32", "{} holds NaN or infinite weights."),
        (3.4e38, "bfloat16", "{} holds NaN or infinite weights in bfloat16."),
        (np.int8(1), "float32", "tensor dtypes (1):\n    - {}: I8 is not implemented"),
        (np.True_, "float32", "tensor dtypes (1):\n    - {}: BOOL is not implemented"),
    ],
)
def test_weights_that_are_not_finite_numbers(tmp_path, tensors, bad, dtype, message):
    name = "model.layers.2.mlp.down_proj.weight"
    broken = tensors[name].astype(bad.dtype if isinstance(bad, np.generic) else np.float32)
    broken[3, 3] = bad
    source = write_folder(tmp_path / "hf", tensors | {name: broken})
    assert message.format(name) in refused(source, tmp_path, dtype=dtype)


def test_float64_is_rounded(tmp_path, tensors):
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    _, notes = convert(str(write_folder(tmp_path / "hf", wide)), tmp_path / "out")
    assert notes == [f"{len(tensors)} float64 tensor(s) are rounded"]
    assert_same_tree(qs_jax.load(tmp_path / "out")[0], llama_tensors()[1])


def test_a_missing_tokenizer(tmp_path, tensors):
    source = write_folder(tmp_path / "hf", tensors, tokenizer=False)
    assert "has no tokenizer" in refused(source, tmp_path)
    assert_converts(source, tmp_path / "out", tokenizer=False)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        qs_jax.load_tokenizer(tmp_path / "out")


def test_tokenizers_of_gpt2_and_llama2(research_data, tmp_path):
    """The published files, with ids that their authors' own tools give for this text."""
    tokenizers = research_data / "tokenizers"
    gpt2 = {"vocab.json": "gpt2/encoder.json", "merges.txt": "gpt2/vocab.bpe"}
    llama2 = {"tokenizer.model": "llama2/tokenizer.model"}
    cases = {
        "gpt2": (gpt2, 50257, [15496, 995, 11, 262, 17031]),
        "llama": (llama2, 32000, [1, 15043, 3186, 29892, 278, 29871, 29896, 29906, 29941]),
    }
    for kind, (files, vocab, expected) in cases.items():
        folder = tmp_path / kind
        model = tiny_model(kind, vocab_size=vocab)
        config = {"model_type": kind, "vocab_size": vocab} | (
            {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 128}
            if kind == "gpt2"
            else {k: v for k, v in LLAMA_CONFIG.items() if k not in ("vocab_size", "model_type")}
        )
        write_folder(folder, hf_tensors(tiny_params(model), model), config, tokenizer=False)
        for name, source in files.items():
            (folder / name).write_bytes((tokenizers / source).read_bytes())
        if kind == "llama":
            message = refused(folder, tmp_path)
            assert "tokenizer.model with tokenizer_config.json" in message
            settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        convert(str(folder), tmp_path / f"{kind}-out")
        tokenizer = qs_jax.load_tokenizer(tmp_path / f"{kind}-out")
        assert tokenizer("Hello world, the 123").input_ids == expected


def test_a_tokenizer_of_another_model(source, tmp_path):
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"extra{i}": 97 + i for i in range(3)}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "it has 100 ids, the model 97" in refused(source, tmp_path)
    tokenizer["model"]["vocab"] = {
        token: index for token, index in tokenizer["model"]["vocab"].items() if index < 97
    }
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 97, "content": "[PAD]"})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    _, notes = convert(str(source), tmp_path / "kept")
    assert notes == [
        "1 added token(s) of the tokenizer are outside the vocabulary of 97; "
        "prompts that use them will be refused"
    ]
    (source / "tokenizer.json").write_text("{")
    assert "the tokenizer cannot be read" in refused(source, tmp_path)


def test_sources_that_cannot_be_read(source, tmp_path):
    assert "no such file or folder" in refused("./nowhere", tmp_path)
    file = source / "model.safetensors"
    assert "not a .gguf" in refused(file, tmp_path)
    whole = file.read_bytes()
    for keep in (4, 100, 5000, -1):
        file.write_bytes(whole[:keep])
        assert "truncated or not a safetensors file" in refused(source, tmp_path)
    file.unlink()
    for config, message in (("[1]", "must hold a JSON object"), ("{}", "has no weights")):
        (source / "config.json").write_text(config)
        assert message in refused(source, tmp_path)
    (source / "config.json").unlink()
    assert "has no config.json" in refused(source, tmp_path)
