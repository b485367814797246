"""Where compiled programs are stored, and that a second start compiles nothing."""

import os
import re
import subprocess
import sys

import jax
import pytest

from qs_jax.compilation_cache import enable_compilation_cache


@pytest.mark.slow
def test_the_second_start_compiles_nothing(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "qs_jax", "generate", "--ckpt", str(tiny_checkpoint)]
    command += ["--preset", "balanced", "--prompt", "hello there", "--max-new-tokens", "2"]
    env = os.environ | {"QS_JAX_CACHE": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def start():
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        counts = re.search(r"compiling (\d+) programs, (\d+) from the cache", done.stderr)
        return [int(count) for count in counts.groups()], {path.name for path in tmp_path.iterdir()}

    (compiled, cached), first = start()
    assert compiled > 0
    assert start() == ([0, compiled + cached], first)


@pytest.mark.parametrize(
    ("flag", "variables", "folder"),
    [
        (None, {}, "home/.cache/qs-jax/xla"),
        (None, {"XDG_CACHE_HOME": "xdg"}, "xdg/qs-jax/xla"),
        (None, {"XDG_CACHE_HOME": "xdg", "QS_JAX_CACHE": "mine"}, "mine"),
        ("flag", {"QS_JAX_CACHE": "mine"}, "flag"),
        (None, {"QS_JAX_CACHE": "off"}, None),
        ("off", {"QS_JAX_CACHE": "mine"}, None),
        ("taken/xla", {}, None),
    ],
)
def test_where_programs_are_kept(tmp_path, monkeypatch, capsys, flag, variables, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file, where no folder can be made")
    for name in ("XDG_CACHE_HOME", "QS_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": str(tmp_path / "home")} | variables).items():
        monkeypatch.setenv(name, value)
    changes = {}
    monkeypatch.setattr(jax.config, "update", changes.__setitem__)
    enable_compilation_cache(flag)
    found = changes.get("jax_compilation_cache_dir")
    assert found == (folder and str(tmp_path / folder if folder.startswith("home") else folder))
    assert (folder is None) or (tmp_path / folder).is_dir()
    assert ("cannot be written" in capsys.readouterr().err) is (flag == "taken/xla")


def test_a_folder_set_for_jax_itself_stays(monkeypatch):
    monkeypatch.delenv("QS_JAX_CACHE")
    jax.config.update("jax_compilation_cache_dir", "mine")
    try:
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "mine"
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
