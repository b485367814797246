"""What a command makes of errors that are not the library's own, and JAX's debug modes."""

import contextlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax import cli, presets
from qs_jax.errors import exit_code
from qs_jax.testing import tiny_model, tiny_params

MODEL = tiny_model()
ROWS = [list(range(2, 30)), list(range(40, 61))]
MODES = {
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "transfers": lambda: jax.transfer_guard("disallow_explicit"),
}


def runs_out_on_the_device():
    jnp.zeros(2**42).block_until_ready()


def runs_out_on_the_host():
    np.ones(2**58)


def runs_out_in_python():
    raise MemoryError


def has_a_bug():
    return {}["key"]


@pytest.mark.parametrize("run", [runs_out_on_the_device, runs_out_on_the_host, runs_out_in_python])
def test_out_of_memory_is_one_line(capsys, run):
    assert exit_code(run) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory")
    assert error.count("\n") == 1
    assert "lower the batch size" in error


@pytest.mark.parametrize("kind", [AssertionError, RuntimeError])
def test_a_platform_without_devices_is_one_line(capsys, monkeypatch, kind):
    """JAX raises one or the other, with or without a message."""

    def refuse(*_):
        raise kind

    monkeypatch.setattr(jax, "devices", refuse)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert exit_code(jax.devices) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "JAX_PLATFORMS=cuda" in error


def test_input_that_is_nested_too_deeply_is_one_line(capsys):
    assert exit_code(lambda: json.loads("[" * 100_000)) == 1
    assert capsys.readouterr().err.startswith("error: an input is nested too deeply")


def test_other_errors_keep_their_traceback():
    with pytest.raises(KeyError):
        exit_code(has_a_bug)


def test_closed_streams_are_silent(monkeypatch):
    """Without them, errors would go to standard output, and reading would fail."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    read = []
    assert exit_code(lambda: read.append(sys.stdin.read())) == 0
    assert read == [""]
    assert exit_code(runs_out_in_python) == 1
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.parametrize("columns", ["0", "1", "-3"])
def test_help_comes_to_an_end_on_any_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        cli.main(["info", "--help"])
    assert "usage" in capsys.readouterr().out


def outputs(params, cfg):
    """Results of every entry point."""
    scored, out = qs_jax.score(params, ROWS, cfg), qs_jax.generate(params, ROWS, cfg)
    steps = [step.tokens for step in qs_jax.stream(params, ROWS, cfg)]
    found = [scored.logprobs, out.tokens, out.logprobs, np.stack(steps, 1)]
    if cfg.quicksilver is not None:
        found += [part.drift for part in (scored.record, out.record)]
    return found


@pytest.mark.parametrize(
    "preset",
    [
        "balanced",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("paper", "small-cache")),
    ],
)
def test_debug_modes_change_nothing(preset):
    params = tiny_params(MODEL)
    quicksilver = None if preset == "off" else presets.by_name(preset, MODEL)
    settings = {"max_new_tokens": 3, "continuation_tokens": 8, "eos_token_ids": ()}
    cfg = qs_jax.Config(MODEL, quicksilver, temperature=0.9, top_p=0.9, **settings)
    expected = outputs(params, cfg)
    for mode in MODES.values():
        with mode():
            found = outputs(params, cfg)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_stream_leaves_the_callers_settings_alone():
    params, cfg = tiny_params(MODEL), qs_jax.Config(MODEL, max_new_tokens=3)
    with jax.debug_nans(True), contextlib.closing(qs_jax.stream(params, ROWS, cfg)) as steps:
        for _ in steps:
            assert jax.config.jax_debug_nans
            with pytest.raises(FloatingPointError):
                jnp.log(jnp.float32(-1)).block_until_ready()
    assert not jax.config.jax_debug_nans
