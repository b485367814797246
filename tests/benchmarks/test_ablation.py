"""Rows by hand, what is taken apart, and resuming."""

import dataclasses
import json
import math

import pytest
from transformers import AutoTokenizer

import qs_jax
from benchmarks import ablation, mechanisms
from qs_jax import presets
from qs_jax.config import KVSkipConfig
from qs_jax.testing import tiny_model, tiny_params
from tests.convert.folders import toy_tokenizer

LAYERS, WIDTH = 6, 192
# One worker: its tests share what they measure.
pytestmark = pytest.mark.xdist_group("ablation")


def test_a_paired_change_is_what_a_hand_finds():
    """Two windows: changes of 0.1 and 0.3 nats, so 0.2 +- 12.706 * 0.1 (Student t, 1 degree)."""
    base = math.log(10)
    row = {"nll": [10 * (base + 0.1), 10 * (base + 0.3)], "tokens": [10, 10]}
    # A third window that the row was not scored on.
    dense = {"nll": [10 * base, 10 * base, 10 * (base + 5)], "tokens": [10, 10, 10]}
    found = mechanisms.paired_change(row, dense)
    assert found["ppl"] == pytest.approx(10 * math.exp(0.2))
    assert found["dense_ppl"] == pytest.approx(10)
    assert found["ppl_increase"] == pytest.approx(10 * (math.exp(0.2) - 1))
    ends = [10 * (math.exp(0.2 + sign * 1.270620473617) - 1) for sign in (-1, 1)]
    assert found["interval"] == pytest.approx(ends)


def test_settings_are_taken_apart_into_what_they_have():
    model = tiny_model(num_layers=LAYERS)
    rows = ablation.take_apart("aggressive", presets.aggressive(model))
    assert list(rows) == ["H", "K", "F", "Q", "H+K", "H+K+F", "H+K+F+Q"]
    assert rows["H+K+F+Q"].quicksilver == presets.aggressive(model)
    letters = [ablation.mechanisms(row.quicksilver) for row in rows.values()]
    assert letters == ["H", "K", "F", "Q", "HK", "HKF", "HKFQ"]
    for row in rows.values():
        qs_jax.Config(model, row.quicksilver)  # all of them can run
    mapped = dataclasses.replace(presets.balanced(model), kv_skip=KVSkipConfig("extrapolate"))
    assert list(ablation.take_apart("mine", mapped)) == ["H", "H+K"]  # maps alone do nothing


@pytest.fixture
def args(tmp_path, monkeypatch):
    """A model with room for prompts of 64 tokens and the 128 that are scored, and a text."""
    model = tiny_model("llama", num_layers=LAYERS, max_positions=256)
    params = tiny_params(model)
    monkeypatch.setattr(qs_jax, "load", lambda *_, **__: (params, model))
    monkeypatch.setattr(mechanisms, "read_manifest", lambda _: {"source": "tiny"})
    toy_tokenizer(tmp_path)
    monkeypatch.setattr(qs_jax, "load_tokenizer", AutoTokenizer.from_pretrained)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    given = {"ckpt": tmp_path, "data": str(tmp_path / "text.txt"), "fit_windows": 1}
    given |= {"settings": ("balanced",), "timed": ("balanced",), "out": tmp_path / "out.json"}
    return ablation.Arguments(windows=2, seq_len=WIDTH, batch_size=2, **given)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_rows(args, monkeypatch):
    score, calls = mechanisms.perplexity.score_windows, []

    def failing(*given, **more):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*given, **more)

    monkeypatch.setattr(mechanisms.perplexity, "score_windows", failing)
    with pytest.raises(KeyboardInterrupt):
        ablation.measure(args)
    assert len(json.loads(args.out.read_text())["measurements"]) == 2
    ablation.measure(args)
    content = json.loads(args.out.read_text())
    # Dense, H, K, H+K, and four bits; the third twice.
    assert len(calls) == 8 + 1
    rows = {(row["name"], row["kind"]): row for row in content["rows"]}
    assert len(rows) == 4 + 4
    whole = rows["H+K", "cumulative"]
    assert whole["kv_bytes_saved"] == pytest.approx(whole["layer_tokens_saved"])
    assert rows["H", "isolated"]["kv_bytes_saved"] == 0
    assert rows["K", "isolated"]["layer_tokens_saved"] == 0
    assert rows["H", "isolated"]["ppl"] == rows["H", "cumulative"]["ppl"]
    assert math.isfinite(whole["time_saved"])
    assert len(content["walkthrough"]["tokens"]) > 10
    with pytest.raises(SystemExit, match="holds other measurements"):
        ablation.measure(dataclasses.replace(args, batch_size=1))
