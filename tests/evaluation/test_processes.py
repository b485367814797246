"""`evaluate` in two processes on loopback: one result, also after one of them is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

import qs_jax
from qs_jax.evaluation.processes import Processes, connect

TEXT = "the quick brown fox jumps over the lazy dog; " * 40


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    (tmp_path / "ckpt").symlink_to(tiny_checkpoint)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def start(folder, out, port=None, index=0, *flags):
    command = [sys.executable, "-m", "qs_jax", "evaluate", "--ckpt", str(folder / "ckpt")]
    command += ["--data", str(folder / "text.txt"), "--out", str(folder / out)]
    command += ["--seq-len", "24", "--batch-size", "2"]
    if port is not None:
        command += ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
        command += ["--process-id", str(index)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(*processes):
    ends = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), ends
    return ends


def content(folder, out):
    return json.loads((folder / out).read_text())


@pytest.mark.slow
def test_a_killed_worker_is_told_and_a_resumed_run_is_that_of_one_process(folder):
    """37 batches: the second process has one fewer."""
    alone = start(folder, "whole.json")
    port = free_port()
    first, second = [start(folder, "killed.json", port, index) for index in (0, 1)]
    journal = folder / "killed.json.1-of-2.partial"
    began = time.monotonic()
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        assert second.poll() is None, second.communicate()
        assert time.monotonic() - began < 120
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    second.communicate()
    _, error = first.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert first.returncode != 0
    assert "process" in error
    assert "--resume" in error
    assert not (folder / "killed.json").exists()
    port = free_port()
    both = [start(folder, "killed.json", port, index, "--resume") for index in (0, 1)]
    ends = finish(alone, *both)
    assert content(folder, "killed.json") == content(folder, "whole.json")
    assert ["perplexity" in out for out, _ in ends] == [True, True, False]
    assert not list(folder.glob("killed.json*partial"))


def test_shares_hold_every_batch_once():
    shares = [Processes(index, 3).share(range(7)) for index in range(3)]
    assert [list(share) for share in shares] == [[0, 3, 6], [1, 4], [2, 5]]
    assert Processes().gather([{"a": 1}, {"b": 2}]) == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("given", "message"),
    [((None, 2, 0), "need --coordinator"), (("127.0.0.1:1", 2, 2), "must be from 0 to 1")],
)
def test_numbers_that_do_not_fit_are_refused(given, message):
    with pytest.raises(qs_jax.ConfigError, match=message):
        connect(*given)
