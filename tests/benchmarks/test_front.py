"""The picture of the front, in miniature."""

import pytest

from benchmarks import front
from qs_jax.files import read_json


@pytest.mark.slow
def test_it_scores_every_way_once_and_draws_them(tiny_checkpoint, tmp_path, monkeypatch):
    text, picture = tmp_path / "text.txt", tmp_path / "front.svg"
    text.write_text("the quick brown fox jumps over the dog; " * 800)
    command = ["--ckpt", str(tiny_checkpoint), "--data", str(text), "--windows", "2"]
    command += ["--fit-windows", "6", "--seq-len", "96", "--batch-size", "2"]
    command += ["--out", str(tmp_path / "out.json")]
    front.main(command)
    content = read_json(tmp_path / "out.json")
    families = [row["family"] for row in content["rows"].values()]
    assert set(families) == {"maps", "skip", "propagate", "random, skip"}
    front.draw(content, picture)
    drawn = picture.read_text(encoding="utf-8")
    assert "perplexity increase" in drawn
    assert "prefers-color-scheme:dark" in drawn
    table = front.tables(content)["front"].splitlines()
    shown = sum(family in ("light", "maps", "skip") for family in families)
    assert sum(line.startswith("| ") for line in table) == shown + 1

    monkeypatch.setattr(front.climb, "point", None)  # nothing is scored again
    front.main(command)
    assert read_json(tmp_path / "out.json")["rows"] == content["rows"]
