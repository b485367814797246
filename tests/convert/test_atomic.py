"""What stands at the target is whole or absent, whatever interrupts a conversion."""

import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest

import qs_jax
from convert import hf_to_flax
from convert.errors import ConversionError
from convert.hf_to_flax import convert
from qs_jax.errors import CheckpointError, OutputError
from tests.convert.folders import (
    assert_converts,
    assert_same_tree,
    llama_tensors,
    refused,
    write_folder,
)


def assert_first_model(folder):
    """The folder holds the checkpoint of `source`."""
    assert_same_tree(qs_jax.load(folder)[0], llama_tensors()[1])


def test_an_existing_target_is_kept_unless_asked(source, tmp_path):
    convert(str(source), tmp_path / "out")
    with pytest.raises(ConversionError, match="exists; pass --overwrite"):
        convert(str(source), tmp_path / "out")
    write_folder(tmp_path / "hf", llama_tensors(seed=1)[0])
    assert_converts(source, tmp_path / "out", seed=1, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]
    with pytest.raises(ConversionError, match="not a converted checkpoint; not overwriting"):
        convert(str(source), source, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="not a folder"):
        convert(str(source), tmp_path / "file")


def test_a_failed_overwrite_keeps_the_old_checkpoint(source, tmp_path):
    convert(str(source), tmp_path / "out")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConversionError, match="truncated"):
        convert(str(source), tmp_path / "out", overwrite=True)
    assert_first_model(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]


def test_too_little_space_is_noticed_before_writing(source, tmp_path, monkeypatch):
    usage = hf_to_flax.shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr(hf_to_flax.shutil, "disk_usage", lambda _: usage)
    assert "GB free, the checkpoint may need" in refused(source, tmp_path)


def test_a_disk_that_fills_up_while_writing(source, tmp_path):
    """A real write failure: the kernel refuses to let files grow beyond a limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(OutputError, match=r"out cannot be written: .*File too large"):
            convert(str(source), tmp_path / "out", tokenizer=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize(
    "sent", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_half_way_leaves_nothing_that_loads(source, tmp_path, sent):
    """While tensors are being written. After SIGKILL a second run succeeds and cleans up."""
    script = textwrap.dedent(
        """
        import sys, time
        from convert import hf_to_flax, sources
        read = sources._read_safetensors
        def slow(path, name):
            if "layers.1.mlp" in name:
                print("half-way", flush=True)
                time.sleep(20)
            return read(path, name)
        sources._read_safetensors = slow
        sys.exit(hf_to_flax.main(sys.argv[1:]))
        """
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "--source", str(source), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "half-way"
    process.send_signal(sent)
    _, error = process.communicate(timeout=120)
    left = [path for path in tmp_path.iterdir() if path.name != "hf"]
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert error.splitlines()[-1] == "interrupted"
        assert "Traceback" not in error
        assert left == []
        return
    assert len(left) == 1, "the folder under construction"
    for folder in (out, *left):
        with pytest.raises(CheckpointError):
            qs_jax.load(folder)
    assert_converts(source, out)
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]


def test_a_symbolic_link_as_target(source, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(str(source), tmp_path / "link")
    assert_converts(source, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["hf", "link", "real"]


def test_what_must_not_be_replaced(source, tmp_path):
    """A checkpoint that holds the source; a folder that was filled during the conversion."""
    convert(str(source), tmp_path / "out")
    inner = source.rename(tmp_path / "out" / "hf")
    with pytest.raises(ConversionError, match="name another --out"):
        convert(str(inner), tmp_path / "out", overwrite=True)
    assert_first_model(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="file exists and is not a folder"):
        convert(str(inner), tmp_path / "file" / "out")
