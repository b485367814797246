"""What is not converted yet is, once, into the user's cache, and then needs no network."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

import qs_jax
from convert import hf_to_flax
from qs_jax import cli, files
from qs_jax.checkpoint import read_manifest
from qs_jax.errors import CheckpointError, ConfigError
from qs_jax.load import find_checkpoint
from qs_jax.models import head
from tests.convert.folders import LLAMA_CONFIG, assert_same_tree, llama_tensors, write_folder
from tests.convert.gguf_files import byte_level_tokenizer, write_gguf
from tests.convert.test_gguf import small_vocab

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where this user's converted checkpoints go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "qs-jax" / "checkpoints"


@pytest.fixture
def source(tmp_path):
    return write_folder(tmp_path / "hf", llama_tensors()[0])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The real client, offline, on a cache laid out as it lays it out: main, and a branch."""
    import huggingface_hub.constants as constants

    repo = tmp_path / "hub" / "models--someone--tiny.llama"
    (repo / "refs" / "pr").mkdir(parents=True)
    for seed, (ref, commit) in enumerate({"main": COMMIT, "pr/1": COMMIT[::-1]}.items()):
        write_folder(repo / "snapshots" / commit, llama_tensors(seed)[0])
        (repo / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_folder_is_converted_once(source, cache, monkeypatch, capsys):
    before = sorted(path.name for path in source.iterdir())
    params, model = qs_jax.load(source)
    assert_same_tree(params, llama_tensors()[1])
    monkeypatch.setattr(hf_to_flax, "convert", None)
    assert_same_tree(qs_jax.load(str(source))[0], params)
    assert qs_jax.load_tokenizer(source)("abc").input_ids
    (folder,) = cache.iterdir()
    assert folder == find_checkpoint(source) == find_checkpoint(folder)
    assert folder.name.startswith("hf@")
    assert (read_manifest(folder)["model"]["dtype"], model.dtype) == ("float32", "float32")
    assert sorted(path.name for path in source.iterdir()) == before
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_changed_is_converted_anew(source, cache):
    first = find_checkpoint(source)
    (source / ".DS_Store").write_bytes(b"x")
    assert find_checkpoint(source) == first
    write_folder(source, llama_tensors(seed=1)[0])
    assert_same_tree(qs_jax.load(source)[0], llama_tensors(seed=1)[1])
    other = shutil.copytree(source, source.parent / "elsewhere" / "hf")
    assert len({first, find_checkpoint(source), find_checkpoint(other)}) == 3
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("rounded", ["all", "some"])
def test_weights_are_stored_as_narrow_as_they_are(tmp_path, rounded):
    tensors = {n: t.astype(ml_dtypes.bfloat16) for n, t in llama_tensors()[0].items()}
    if rounded == "some":
        tensors["lm_head.weight"] = llama_tensors()[0]["lm_head.weight"]
    folder = find_checkpoint(write_folder(tmp_path / "hf", tensors))
    expected = "bfloat16" if rounded == "all" else "float32"
    assert read_manifest(folder)["model"]["dtype"] == expected
    params, _ = qs_jax.load(folder, dtype="float32")
    stored = tensors["lm_head.weight"].astype(np.float32)
    np.testing.assert_array_equal(head.head_table(params), stored)


def test_a_gguf_file(tmp_path, cache):
    pytest.importorskip("gguf")
    tensors, made = small_vocab(llama_tensors()[0]), byte_level_tokenizer()
    path = write_gguf(tmp_path / "tiny.Q8.gguf", tensors, LLAMA_CONFIG, tokenizer=made)
    params, _ = qs_jax.load(path)
    expected = tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embed"]["tokens"], expected)
    assert qs_jax.load_tokenizer(path)("the").input_ids
    assert [folder.name[:8] for folder in cache.iterdir()] == ["tiny.Q8@"]


def test_a_hub_id_needs_the_network_once(hub, cache):
    params, _ = qs_jax.load("someone/tiny.llama")
    assert_same_tree(params, llama_tensors()[1])
    branch, _ = qs_jax.load("someone/tiny.llama", revision="pr/1")
    assert_same_tree(branch, llama_tensors(seed=1)[1])
    shutil.rmtree(hub)
    assert_same_tree(qs_jax.load("someone/tiny.llama")[0], params)
    assert qs_jax.load_tokenizer("someone/tiny.llama", revision="pr/1")("abc").input_ids
    revisions = {path.name: read_manifest(path)["revision"] for path in cache.iterdir()}
    expected = {"someone--tiny.llama": COMMIT, "someone--tiny.llama@pr%2F1": COMMIT[::-1]}
    assert revisions == expected
    with pytest.raises(CheckpointError, match=r"someone/tiny.llama .*could not be fetched"):
        qs_jax.load("someone/tiny.llama", revision="pr/2")


@pytest.mark.parametrize("moment", ["_manifest", "_move_into_place"])
def test_of_two_that_convert_at_once_the_first_wins(source, cache, monkeypatch, moment):
    """The other finishes amid this conversion: before it looks again, or after."""
    module = hf_to_flax if moment == "_manifest" else files
    real, found = getattr(module, moment), []

    def meanwhile(*args):
        if not found:
            found.append(None)
            found[0] = find_checkpoint(source)
            (found[0] / "winner").touch()
        return real(*args)

    monkeypatch.setattr(module, moment, meanwhile)
    assert (find_checkpoint(source) / "winner").exists()
    assert [*cache.iterdir()] == found


@pytest.mark.parametrize("damage", ["no manifest", "another format", "a lost file", "a short file"])
def test_what_is_damaged_in_the_cache_is_converted_again(source, damage):
    folder = find_checkpoint(source)
    chunk = next(path for path in (folder / "params").rglob("*") if path.name == "0.0.0")
    if damage == "no manifest":
        (folder / "qs_jax.json").unlink()
    elif damage == "another format":
        manifest = read_manifest(folder) | {"format_version": -1}
        (folder / "qs_jax.json").write_text(json.dumps(manifest))
    elif damage == "a lost file":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:-1])
    assert_same_tree(qs_jax.load(source)[0], llama_tensors()[1])


def test_what_is_no_checkpoint(tmp_path, source, cache):
    for name in ("nowhere", "a/b/c", str(tmp_path / "nowhere"), "org/model.gguf"):
        with pytest.raises(CheckpointError, match=r"is not a folder, a \.gguf file or a hub id"):
            qs_jax.load(name)
    with pytest.raises(CheckpointError, match="has no config"):
        qs_jax.load_tokenizer(tmp_path)
    for local in (source, find_checkpoint(source), "embedded"):
        with pytest.raises(ConfigError, match="is no hub id"):
            qs_jax.load(local, revision="main")
    (source / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"foo": 1}))
    with pytest.raises(CheckpointError, match="foo = 1 is not known for llama"):
        qs_jax.load(source)
    assert len([*cache.iterdir()]) == 1


def test_commands_take_what_load_takes(source, hub, capsys):
    """And the text is drawn as generation_config.json says, or as asked."""
    generation = {"do_sample": True, "temperature": 3.0, "top_k": 90}
    (source / "generation_config.json").write_text(json.dumps(generation))
    texts = []
    for ckpt, *more in (
        (source,),
        ("someone/tiny.llama", "--temperature", "3", "--top-k", "90"),
        ("someone/tiny.llama",),
        (source, "--temperature", "0"),
        ("someone/tiny.llama", "--revision", "pr/1"),
    ):
        words = ["--ckpt", str(ckpt), "--prompt", "abc", "--max-new-tokens", "9", "--quiet", *more]
        assert cli.main(["generate", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] == texts[3] != texts[4]
    assert cli.main(["info", "--ckpt", "someone/tiny.llama"]) == 0
    assert COMMIT in capsys.readouterr().out
