"""`qs-jax diagnose` on a tiny model: its file, its preset, and mistakes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import qs_jax
from qs_jax import diagnostics, presets
from qs_jax.commands.diagnose import Diagnose
from qs_jax.config import HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.errors import InputError

pytestmark = pytest.mark.xdist_group("diagnosis")
TEXT = "I do not like the movie. 1 > 0"
PRESET = QuickSilverConfig(
    halting=HaltingConfig(tau_drift=1e9, entropy=None, forced_ids=(), layers=(1,)),
    kv_skip=KVSkipConfig("skip"),
    sink_tokens=20,
)


@pytest.fixture
def command(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    preset = presets.save(tmp_path / "preset.json", PRESET)
    return Diagnose(ckpt=tiny_checkpoint, text=TEXT, preset=str(preset), out=tmp_path / "out.json")


def test_it_writes_what_diagnose_finds_and_a_preset_that_recovers(command, tmp_path, capsys):
    safe = tmp_path / "safe.json"
    command = dataclasses.replace(command, suggest_protect=safe, percentile=50.0, max_protect=3)
    command.run()
    printed = capsys.readouterr().out
    content = json.loads(command.out.read_text())
    params, model = qs_jax.load(command.ckpt)
    ids = qs_jax.load_tokenizer(command.ckpt)(TEXT).input_ids
    cfg = qs_jax.Config(model, PRESET, engine="masked")
    found = diagnostics.diagnose(params, ids, cfg)
    assert [row["id"] for row in content["tokens"]] == ids
    assert "".join(row["text"] for row in content["tokens"]) == TEXT
    np.testing.assert_allclose(content["drift_index"], found.drift_index[:, 0], rtol=1e-5)
    attribution = [row["attribution"] for row in content["tokens"]]
    np.testing.assert_allclose(attribution, found.attribution[0], rtol=1e-4, atol=1e-7)
    assert [row["layers_run"] for row in content["tokens"]] == [3] * 20 + [1] * 10
    suggested = content["protect"]["protect_ids"]
    assert 0 < len(suggested) <= 3
    loaded = presets.load(safe, model)
    assert list(loaded.protect_ids) == sorted(suggested)
    tokens = loaded.provenance["protected"]["tokens"]
    assert [entry["text"] for entry in tokens] == [chr(entry["id"] + 30) for entry in tokens]
    again = qs_jax.score(params, ids, cfg.replace(quicksilver=loaded))
    assert content["protect"]["after"]["perplexity"] == pytest.approx(again.perplexity, rel=1e-5)
    for word in ("dense", "protected", "flagged tokens", "20 at most", str(safe.name)):
        assert word in printed
    assert "[red]" not in printed


def test_a_file_is_cut_and_says_so(command, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    command = dataclasses.replace(command, text=str(tmp_path / "text.txt"), limit_tokens=12)
    command.run()
    printed = capsys.readouterr().out
    content = json.loads(command.out.read_text())
    assert len(content["tokens"]) == 12
    assert content["config"]["tokens_left_out"] == len(TEXT) - 12
    assert "18 left out" in printed
    assert "touched no token" in printed
    assert content["protect"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "x"}, "nothing to predict"),
        ({"preset": "off"}, "every mechanism is off"),
        ({"suggest_protect": Path("safe.txt")}, "must end in .json"),
        ({"suggest_protect": Path("safe.json")}, "name another --suggest-protect"),
    ],
)
def test_mistakes(command, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "safe.json").write_text("ours")
    with pytest.raises(InputError, match=message):
        dataclasses.replace(command, **changes).run()
    assert (tmp_path / "safe.json").read_text() == "ours"
