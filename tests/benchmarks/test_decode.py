"""The benchmark of drafts, in miniature."""

import pytest

from benchmarks import decode
from qs_jax.files import read_json


@pytest.mark.slow
def test_it_compares_texts_and_times(tiny_checkpoint, tmp_path, monkeypatch):
    prompts = {kind: [[5, 6, 7] * 4, [8, 9] * 5] for kind in ("copy", "code", "tasks", decode.TEXT)}
    monkeypatch.setattr(decode, "prompts_of", lambda args: prompts)
    monkeypatch.setattr(decode, "BATCH", 3)
    out = tmp_path / "out.json"
    decode.main(["--ckpt", str(tiny_checkpoint), "--quick", "--out", str(out)])
    content = read_json(out)
    assert content["same_tokens_float32"] == 1
    names = ("lookup_over_plain", "lookup_over_plain_copy_code", "worst_kind")
    assert all(content[name] > 0 for name in names)
    shown = [(row["kind"], row["rows"], row["texts"]) for row in content["rows"]]
    kinds = [("copy", 1, 2), ("code", 1, 2), ("tasks", 1, 2), ("all", 1, 6)]
    assert shown == [*kinds, (decode.TEXT, 1, 2), ("all", 3, 6)]
    assert all(row["tokens_per_pass"] >= 1 for row in content["rows"])
