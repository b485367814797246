"""Which of a folder's weight files are read: those that transformers reads, or none."""

import fnmatch
import json
import shutil

import numpy as np
import pytest

import qs_jax
from convert.hf_to_flax import convert, open_source
from convert.sources import open_folder
from tests.convert.folders import LLAMA_CONFIG, llama_tensors, refused, write_folder
from tests.support import GPT2, LLAMA

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.hf
EMBEDDING = "model.embed_tokens.weight"


def save(path, tensors):
    from safetensors.numpy import save_file

    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save({name: torch.tensor(t) for name, t in tensors.items()}, path)


def save_shards(folder, stem, tensors, missing=None):
    """Two shards and their index, where one of them may be missing."""
    kind, names, weight_map = stem.rpartition(".")[2], sorted(tensors), {}
    for part in range(2):
        file = f"{stem.partition('.')[0]}-0000{part + 1}-of-00002.{kind}"
        if part != missing:
            save(folder / file, {name: tensors[name] for name in names[part::2]})
        weight_map |= dict.fromkeys(names[part::2], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.index.json").write_text(json.dumps(index))


def write_sets(folder, sets):
    """Each set holds a model of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    for seed, name in enumerate(sets.split()):
        tensors = llama_tensors(seed)[0]
        name, _, how = name.partition(":")
        if how == "shards":
            save_shards(folder, name, tensors)
        elif how == "stale":
            save_shards(folder, name, tensors, missing=0)
        else:
            save(folder / name, tensors)
    return folder


@pytest.mark.parametrize(
    "sets",
    [
        "model.safetensors model.safetensors:shards",
        "model.safetensors:stale model.safetensors",
        "pytorch_model.bin model.safetensors",
        "pytorch_model.bin model.safetensors:shards",
        "pytorch_model.bin:shards pytorch_model.bin",
        "model.fp16.safetensors consolidated.00.pth pytorch_model.bin adapter_model.safetensors",
    ],
)
def test_the_weights_are_those_of_transformers(tmp_path, sets):
    from transformers import AutoModelForCausalLM

    source = write_sets(tmp_path / "hf", sets)
    opened = open_folder(source)
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    for name, tensor in opened.tensors.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name].numpy())
    assert ("is not read" in "".join(opened.notes)) == ("adapter" not in sets)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("model.fp16.safetensors", "it has config.json, model.fp16.safetensors"),
        ("consolidated.00.pth", "it has config.json, consolidated.00.pth"),
        ("model-00001-of-00001.safetensors", "it has config.json, model-00001-of-00001"),
        ("model.safetensors:stale pytorch_model.bin", "00001-of-00002.safetensors is missing"),
    ],
)
def test_weights_that_transformers_does_not_find_are_refused(tmp_path, sets, message):
    from transformers import AutoModelForCausalLM

    source = write_sets(tmp_path / "hf", sets)
    assert message in refused(source, tmp_path, tokenizer=False)
    with pytest.raises(OSError, match=r"[Nn]o"):
        AutoModelForCausalLM.from_pretrained(source)


def test_files_that_are_no_weights(source, tmp_path):
    weights = source / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "run `git lfs pull`" in refused(source, tmp_path)
    (source / "adapter_config.json").write_text("{}")
    assert "Merge the two" in refused(source, tmp_path)


@pytest.mark.parametrize("sets", ["model.safetensors model.safetensors:shards pytorch_model.bin"])
@pytest.mark.parametrize("without", [0, 1, 2])
def test_a_download_fetches_what_is_read(tmp_path, monkeypatch, sets, without):
    import huggingface_hub

    names = [name for index, name in enumerate(sets.split()) if index >= without]
    repo, cache, fetched = write_sets(tmp_path / "repo", " ".join(names)), tmp_path / "cache", set()

    def snapshot_download(repo_id, revision, allow_patterns):
        cache.mkdir(exist_ok=True)
        for path in repo.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
                fetched.add(path.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    tensors = open_source("someone/tiny").tensors
    assert tensors.keys() == llama_tensors(0)[0].keys()
    kinds = [{"model.safetensors"}, {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}]
    index = {"model.safetensors.index.json"} if without == 1 else set()
    expected = [*kinds, {"pytorch_model.bin"}][without] | index
    assert fetched == {"config.json"} | expected


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        ("model.safetensors", "lm_head.weight"),
        ("shards", "lm_head.weight"),
        ("pytorch_model.bin", "lm_head.weight"),
        ("shards", "both"),
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tied_weights_are_found_under_either_name(tmp_path, kind, stored, kept):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = LLAMA if kind == "llama" else GPT2
    config = AutoConfig.for_model(kind, **sizes, tie_word_embeddings=True)
    hf = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path / "hf")
    tensors = {name: t.numpy() for name, t in hf.state_dict().items()}
    name = EMBEDDING if kind == "llama" else "transformer.wte.weight"
    if kept != "both":
        del tensors[name]
    tensors = {name: t.copy() for name, t in tensors.items()}
    if stored == "shards":
        save_shards(tmp_path / "hf", "model.safetensors", tensors)
    else:
        save(tmp_path / "hf" / stored, tensors)
    convert(str(tmp_path / "hf"), tmp_path / "out", tokenizer=False)
    params, _ = qs_jax.load(tmp_path / "out", dtype=None)
    assert "head" not in params
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").get_input_embeddings().weight
    np.testing.assert_array_equal(params["embed"]["tokens"], again.detach().numpy())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": [-Infinity]}', "-Infinity is not JSON"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "nested too deep"),
        ("", "cannot be read as JSON"),
    ],
)
@pytest.mark.parametrize("name", ["config", "generation_config", "tokenizer_config"])
def test_files_that_are_not_json(tmp_path, tensors, name, text, message):
    source = write_folder(tmp_path / "hf", tensors)
    (source / f"{name}.json").write_text(text)
    said = refused(source, tmp_path)
    assert message in said or (name == "tokenizer_config" and "tokenizer cannot be read" in said)
