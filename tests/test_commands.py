"""What all commands promise: the mistakes they share are one clear line, and change nothing."""

import pytest

from qs_jax import cli

COMMANDS = {
    "generate": {"--prompt": "x"},
    "evaluate": {"--data": "text.txt", "--seq-len": "48"},
    "calibrate": {"--data": "text.txt", "--max-ppl-increase": "1"},
    "tasks": {"--tasks": "sst2", "--data": "sst2.jsonl"},
    "diagnose": {"--text": "I do not like it.", "--preset": "paper"},
    "report": {"--text": "I do not like it."},
}
WRITE = set(COMMANDS) - {"generate"}
# Flags, what the error says, and the commands that have the flag.
MISTAKES = {
    "no checkpoint": ({"--ckpt": "nowhere"}, "is not a folder", set(COMMANDS)),
    "no preset": ({"--preset": "fast"}, "unknown preset 'fast'", set(COMMANDS) - {"calibrate"}),
    "no use for maps": (
        {"--kv-maps": "maps.safetensors"},
        "--kv-maps is for presets",
        set(COMMANDS) - {"calibrate"},
    ),
    "out is there": ({"--out": "there.json"}, "--overwrite", WRITE),
    "out is a folder": ({"--out": "."}, "is a folder", WRITE),
    "out is in no folder": ({"--out": "nowhere/out.json"}, "there is no folder nowhere", WRITE),
    "no such devices": ({"--devices": "99"}, "devices must be", {"evaluate", "tasks"}),
    "no batch": ({"--batch-size": "0"}, "--batch-size must be at least 1", {"evaluate", "tasks"}),
}
CASES = [(name, of) for of, row in MISTAKES.items() for name in COMMANDS if name in row[2]]


@pytest.mark.parametrize(("name", "mistake"), CASES)
def test_mistakes_are_one_clear_line(tiny_checkpoint, tmp_path, monkeypatch, capsys, name, mistake):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox " * 1000)
    (tmp_path / "there.json").write_text("mine")
    flags, message, _ = MISTAKES[mistake]
    given = {"--ckpt": str(tiny_checkpoint)} | ({"--out": "out.json"} if name in WRITE else {})
    given |= COMMANDS[name] | flags
    assert cli.main([name, *(word for pair in given.items() for word in pair)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "there.json"]
    assert (tmp_path / "there.json").read_text() == "mine"


def test_an_unknown_engine_is_refused(tiny_checkpoint, capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--engine", "steam"])
    assert "steam" in capsys.readouterr().err
