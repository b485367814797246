"""Ways to hold the weights, in miniature."""

import pytest

from benchmarks import weights
from qs_jax.files import read_json


@pytest.mark.slow
def test_every_way_that_a_checkpoint_has_is_scored_and_timed(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(weights, "NEW", 3)
    monkeypatch.setattr(weights, "PROMPT", 8)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the dog; " * 100)
    options = ["--ckpt", str(tiny_checkpoint), "--data", str(tmp_path / "text.txt")]
    options += ["--windows", "2", "--seq-len", "32", "--rounds", "2"]
    weights.main([*options, "--out", str(tmp_path / "out.json")])
    rows = read_json(tmp_path / "out.json")["rows"]
    assert list(rows) == ["bfloat16", "int8"]
    printed = capsys.readouterr().out
    assert "gguf is left out" in printed
    assert sum(line.startswith("| `") for line in printed.splitlines()) == 2
    assert rows["int8"]["bytes"] < rows["bfloat16"]["bytes"]
    assert rows["int8"]["perplexity"] == pytest.approx(rows["bfloat16"]["perplexity"], rel=0.1)
    assert rows["bfloat16"]["step, 1 row"]["ratio"] == 1
