"""The command line on a tiny model: what it prints, and how it fails."""

import io
import subprocess
import sys

import pytest

import qs_jax
from qs_jax import cli

pytestmark = pytest.mark.xdist_group("cli")


@pytest.fixture
def ckpt(tiny_checkpoint):
    return str(tiny_checkpoint)


def continuation(ckpt, prompt, count, **settings):
    params, model = qs_jax.load(ckpt)
    tokenizer = qs_jax.load_tokenizer(ckpt)
    cfg = qs_jax.Config(model=model, max_new_tokens=count, **settings)
    out = qs_jax.generate(params, [tokenizer(prompt).input_ids], cfg)
    return tokenizer.decode(out.tokens[0, : out.lengths[0]], skip_special_tokens=True)


def test_generate_prints_prompt_text_and_timings(ckpt, capsys):
    command = ["generate", "--ckpt", ckpt, "--prompt", "hello", "--max-new-tokens", "12"]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == "hello" + continuation(ckpt, "hello", 12) + "\n"
    for word in ("prefill 5 tokens in", "decode", "tokens/s", "compiling"):
        assert word in captured.err


def test_generate_takes_a_preset_by_name_or_file(ckpt, capsys, tmp_path):
    command = ["generate", "--ckpt", str(ckpt), "--prompt", "ab" * 20, "--max-new-tokens", "4"]
    assert cli.main([*command, "--preset", "balanced"]) == 0
    by_name = capsys.readouterr().out
    _, model = qs_jax.load(ckpt)
    path = qs_jax.presets.save(tmp_path / "mine.json", qs_jax.presets.balanced(model), model)
    assert cli.main([*command, "--preset", str(path)]) == 0
    assert capsys.readouterr().out == by_name
    assert cli.main([*command, "--preset", "balanced", "--protocol", "teacher-forced"]) == 1
    assert "ranks a whole prompt" in capsys.readouterr().err


def test_quiet_prints_the_continuation_only(ckpt, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    settings = {"temperature": 0.8, "top_k": 9, "seed": 3}
    flags = ["--temperature", "0.8", "--top-k", "9", "--seed", "3", "--quiet"]
    flags += ["--max-new-tokens", "12"]
    assert cli.main(["generate", "--ckpt", ckpt, "--prompt", "-", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out == continuation(ckpt, "abc", 12, **settings) + "\n"
    assert captured.err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--chat"], "no chat template"),
        (["--prompt", "x", "--system", "y"], "--system needs --chat"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--max-new-tokens", "128"], "exceed this model's 128 positions"),
    ],
)
def test_mistakes_are_one_clear_line(ckpt, capsys, flags, message):
    assert cli.main(["generate", "--ckpt", ckpt, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_info(ckpt, capsys):
    assert cli.main(["info", "--ckpt", ckpt]) == 0
    text = capsys.readouterr().out
    assert "llama" in text
    assert "max_positions" in text


@pytest.mark.slow
def test_the_module_in_a_shell(ckpt):
    """Input that is not text is one clear line; a closed pipe is none."""
    command = [sys.executable, "-m", "qs_jax", "generate", "--ckpt", ckpt, "--prompt"]
    for prompt, stdin in ((["-"], b"\xff\xfe"), ([b"a\xff"], b"")):
        done = subprocess.run([*command, *prompt], input=stdin, capture_output=True, check=False)
        assert done.returncode == 1
        error = done.stderr.decode()
        assert error.startswith("error: ")
        assert "UTF-8" in error
        assert "Traceback" not in error
    script = f"{' '.join(command)} hello | true"
    piped = subprocess.run(script, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in piped.stderr
