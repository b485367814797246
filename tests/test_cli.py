"""The command line on a tiny model: what it prints, and how it fails."""

import io
import os
import re
import subprocess
import sys

import pytest

import qs_jax
from qs_jax import cli
from qs_jax.commands import options

pytestmark = pytest.mark.xdist_group("cli")
COMMANDS = {
    "generate": {"--prompt": "x"},
    "evaluate": {"--data": "text.txt", "--seq-len": "48"},
    "calibrate": {
        "--data": "text.txt",
        "--max-ppl-increase": "1",
        "--seq-len": "48",
        "--continuation-tokens": "8",
    },
    "tasks": {"--tasks": "sst2", "--data": "sst2.jsonl"},
    "diagnose": {"--text": "I do not like it.", "--preset": "paper"},
    "report": {"--text": "I do not like it."},
}
WRITE = set(COMMANDS) - {"generate"}
READ_PRESETS = set(COMMANDS) - {"calibrate"}
GENERATE = {"generate"}
# Flags, what the error says, and the commands that have the flag.
MISTAKES = [
    ({"--ckpt": "nowhere"}, "is not a folder", set(COMMANDS)),
    ({"--preset": "fast"}, "unknown preset 'fast'", READ_PRESETS),
    ({"--kv-maps": "maps.safetensors"}, "maps.safetensors: KV maps are for", READ_PRESETS),
    ({"--out": "there.json"}, "--overwrite", WRITE),
    ({"--out": "."}, "is a folder", WRITE),
    ({"--out": "nowhere/out.json"}, "there is no folder nowhere", WRITE),
    ({"--devices": "99"}, "devices must be", {"evaluate", "generate", "tasks"}),
    ({"--batch-size": "0"}, "--batch-size must be at least 1", {"evaluate", "tasks"}),
    ({"--prompt": ""}, "the prompt is empty", GENERATE),
    ({"--chat": ""}, "no chat template", GENERATE),
    ({"--system": "y"}, "--system needs --chat", GENERATE),
    ({"--temperature": "-1"}, "temperature", GENERATE),
    ({"--max-new-tokens": "0"}, "--max-new-tokens must be at least 1, got 0", GENERATE),
    ({"--top-k": "-1"}, "--top-k must be at least 0", GENERATE),
    ({"--top-p": "0"}, "--top-p must be greater than 0", GENERATE),
    ({"--min-p": "2"}, "--min-p must be at most 1", GENERATE),
    ({"--top-p": "nan"}, "--top-p must be a number", GENERATE),
    ({"--repetition-penalty": "inf"}, "--repetition-penalty must be a finite", GENERATE),
    ({"--seed": "-1"}, "--seed must be at least 0", {"generate", "tasks"}),
    ({"--seed": str(2**32)}, "--seed must be less than 4294967296", {"generate", "tasks"}),
    ({"--limit": "0"}, "--limit must be at least 1", {"tasks"}),
    ({"--train-share": "1"}, "--train-share must be less than 1", {"tasks"}),
    ({"--l2": "-1"}, "--l2 must be at least 0", {"tasks"}),
    ({"--seq-len": "1"}, "--seq-len must be at least 2", {"evaluate", "calibrate"}),
    ({"--limit-windows": "0"}, "--limit-windows must be at least 1", {"evaluate"}),
    ({"--continuation-tokens": "0"}, "--continuation-tokens must be at least 1", WRITE - {"tasks"}),
    ({"--limit-tokens": "1"}, "--limit-tokens must be at least 2", {"diagnose", "report"}),
    ({"--percentile": "500"}, "--percentile must be at most 100", {"diagnose"}),
    ({"--max-protect": "0"}, "--max-protect must be at least 1", {"diagnose"}),
    ({"--preset": "off"}, "nothing to diagnose", {"diagnose"}),
    ({"--confidence": "1"}, "--confidence must be less than 1", {"calibrate"}),
    ({"--max-ppl-increase": "inf"}, "--max-ppl-increase must be a finite", {"calibrate"}),
    ({"--layers": "99"}, "layers must be between 1 and 2, got [99]", {"calibrate"}),
    ({"--features": "embedding"}, "features must hold 'state'", {"calibrate"}),
    ({"--max-new-tokens": "128"}, "exceed this model's 128 positions", GENERATE),
]


@pytest.fixture
def ckpt(tiny_checkpoint):
    return str(tiny_checkpoint)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [(name, flags, message) for flags, message, names in MISTAKES for name in sorted(names)],
)
def test_mistakes_are_one_clear_line(ckpt, tmp_path, monkeypatch, capsys, name, flags, message):
    """Before the weights are read; and change nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "load", None)
    (tmp_path / "text.txt").write_text("the quick brown fox " * 1000)
    (tmp_path / "there.json").write_text("mine")
    given = {"--ckpt": ckpt} | ({"--out": "out.json"} if name in WRITE else {})
    given |= COMMANDS[name] | flags
    words = [word for pair in given.items() for word in pair if word or pair[0] == "--prompt"]
    assert cli.main([name, *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "there.json"]
    assert (tmp_path / "there.json").read_text() == "mine"


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


def test_generate_ends_before_a_stop_string(ckpt, capsys):
    whole = continuation(ckpt, "hello", 12)
    stop = whole[5:8]
    command = ["generate", "--ckpt", ckpt, "--prompt", "hello", "--max-new-tokens", "12", "--quiet"]
    assert cli.main([*command, "--stop", "no such text", "--stop", stop]) == 0
    assert capsys.readouterr().out == whole[: whole.index(stop)] + "\n"


@pytest.mark.parametrize("more", [("--speculate",), ("--preset", "fast-answers")], ids=str)
def test_drafts_print_the_same_text_and_their_counts(ckpt, capsys, more):
    prompt = "abcabcabc" * 4
    command = ["generate", "--ckpt", ckpt, "--prompt", prompt, "--max-new-tokens", "12", "--quiet"]
    plain = ["--preset", "balanced"] if "--preset" in more else []
    assert cli.main([*command, *plain]) == 0
    expected = capsys.readouterr().out
    assert cli.main([*command[:-1], *more, "--stats"]) == 0
    found = capsys.readouterr()
    assert found.out == prompt + expected
    assert re.search(r"12 tokens in \d+ passes, \d+ of \d+ drafted ones kept", found.err)


def test_generate_takes_a_preset_by_name_or_file(ckpt, capsys, tmp_path):
    command = ["generate", "--ckpt", ckpt, "--prompt", "ab" * 20, "--max-new-tokens", "4"]
    assert cli.main([*command, "--preset", "balanced"]) == 0
    by_name = capsys.readouterr().out
    _, model = qs_jax.load(ckpt)
    path = qs_jax.presets.save(tmp_path / "mine.json", qs_jax.presets.balanced(model), model)
    assert cli.main([*command, "--preset", str(path)]) == 0
    assert capsys.readouterr().out == by_name
    assert cli.main([*command, "--preset", "balanced", "--protocol", "teacher-forced"]) == 1
    assert "ranks a whole prompt" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["1x4", "2"])
def test_generate_on_several_devices(ckpt, capsys, devices):
    command = ["generate", "--ckpt", ckpt, "--prompt", "hello", "--max-new-tokens", "12"]
    assert cli.main([*command, "--dtype", "float32", "--devices", devices]) == 0
    assert capsys.readouterr().out == "hello" + continuation(ckpt, "hello", 12) + "\n"


def test_quiet_prints_the_continuation_only(ckpt, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    flags = "--temperature 0.8 --top-k 9 --seed 3 --quiet --max-new-tokens 12 --prompt -".split()
    assert cli.main(["generate", "--ckpt", ckpt, *flags]) == 0
    captured = capsys.readouterr()
    expected = continuation(ckpt, "abc", 12, temperature=0.8, top_k=9, seed=3)
    assert (captured.out, captured.err) == (expected + "\n", "")


def test_info_and_a_choice_that_is_none(ckpt, capsys):
    assert cli.main(["info", "--ckpt", ckpt]) == 0
    text = capsys.readouterr().out
    assert "llama" in text
    assert "max_positions" in text
    assert "bytes in memory, int8" in text
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--engine", "steam"])
    assert "steam" in capsys.readouterr().err


def test_names_in_tables_are_no_markup(capsys):
    name = "[bold]:smile:[/x]"
    options.print_table(name, (name, name), [(name, name)])
    assert capsys.readouterr().out.count(name) == 5


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "value", "code"),
    [
        ("JAX_DISABLE_JIT", "1", 0),
        ("JAX_DEBUG_NANS", "1", 0),
        ("JAX_NUMPY_DTYPE_PROMOTION", "strict", 0),
        ("JAX_TRANSFER_GUARD", "disallow", 0),
        ("JAX_PLATFORMS", "nonsense", 1),
        ("JAX_NUM_CPU_DEVICES", "0", 1),
    ],
)
def test_settings_of_jax_in_a_shell(ckpt, setting, value, code):
    """Each works, or is one clear line that names it."""
    words = ["generate", "--ckpt", ckpt, "--prompt", "ab" * 9, "--preset", "balanced", "--quiet"]
    command = [sys.executable, "-m", "qs_jax", *words, "--max-new-tokens", "2"]
    given = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    given |= {setting: value}
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith("error: JAX finds no device of the platform") or code == 0
    assert done.stderr.count("\n") == code
    assert f"{setting}={value}" in done.stderr or code == 0
