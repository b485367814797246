"""`python -m qs_jax report` on a tiny model: its page, and mistakes."""

import dataclasses
import sys

import numpy as np
import pytest

import qs_jax
from qs_jax import presets
from qs_jax.commands.report import Report
from qs_jax.config import HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.errors import InputError
from tests.report.support import Page

TEXT = "I do not like the movie. <b>1 > 0</b> & so on, for 60 tokens."
PRESET = QuickSilverConfig(
    halting=HaltingConfig(rule="quota", layers=(1,), quota=(0.5,), entropy=None),
    kv_skip=KVSkipConfig("skip"),
    recent_tokens=4,
)


@pytest.fixture
def command(tiny_checkpoint, tmp_path):
    preset = presets.save(tmp_path / "half.json", PRESET)
    return Report(out=tmp_path / "out.html", ckpt=tiny_checkpoint, text=TEXT, preset=(str(preset),))


def test_the_page_holds_what_score_finds(command, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    dataclasses.replace(command, text=str(file)).run()
    assert "wrote" in capsys.readouterr().out
    page = Page(command.out.read_text(encoding="utf-8"))
    params, model = qs_jax.load(command.ckpt)
    ids = qs_jax.load_tokenizer(command.ckpt)(TEXT).input_ids
    text = page.data["text"]
    np.testing.assert_array_equal(page.array(text["ids"]), ids)
    assert "".join(text["labels"]) == TEXT
    scored = len(ids) // 4
    prompt = len(ids) - scored
    assert page.data["about"]["protocol"] == f"continuation, last {scored} tokens scored"
    cfg = qs_jax.Config(model, PRESET, engine="masked", continuation_tokens=scored)
    scores = qs_jax.score(params, ids, cfg)
    shown = page.run("HK")
    np.testing.assert_array_equal(shown["depth"], scores.record.depth[0])
    assert 0 < shown["summary"]["halted"] < len(ids)
    assert shown["summary"]["perplexity"] == pytest.approx(scores.perplexity, rel=1e-5)
    received = shown["received"]
    assert np.isnan(received[:, prompt:]).all()
    # At the halting layer the quota took those that got the least attention.
    stopped = scores.record.depth[0] == 1
    spared = ~stopped & (np.arange(len(ids)) >= 4) & (np.arange(len(ids)) < prompt - 4)
    assert received[0][stopped].max() <= received[0][spared].min()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": None}, "--text, --results"),
        ({"ckpt": None}, "needs --ckpt"),
        ({"text": "a"}, "nothing to predict"),
        ({"text": "x" * 500}, "positions"),
        ({"continuation_tokens": 99}, "no prompt before its last 99"),
        ({"preset": ()}, "names nothing"),
    ],
)
def test_mistakes_are_named(command, changes, message):
    with pytest.raises((InputError, qs_jax.errors.ConfigError), match=message):
        dataclasses.replace(command, **changes).run()
    assert not command.out.exists()


def test_a_missing_extra_is_named_before_anything_runs(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"qs-jax\[plots\]"):
        dataclasses.replace(command, figures=tmp_path / "figures").run()
    assert not command.out.exists()
