"""`python -m qs_jax tasks` on a tiny model: its file, its table, heads, and mistakes."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from rich import console

import qs_jax
from qs_jax import presets
from qs_jax.checkpoint import read_manifest
from qs_jax.commands.tasks import Tasks
from qs_jax.errors import ConfigError, InputError
from qs_jax.evaluation import tasks
from qs_jax.evaluation.heads import Head
from tests.evaluation.settings import quota
from tests.evaluation.test_tasks import RTE, TOY, toy_rows, write

pytestmark = pytest.mark.xdist_group("tasks")
SETTINGS = quota()


@pytest.fixture
def run(tiny_checkpoint, tmp_path, monkeypatch):
    """Runs the command on 24 rows of a toy task; returns the results."""
    monkeypatch.setattr(console, "detect_legacy_windows", lambda: False)
    monkeypatch.setitem(tasks.TASKS, "toy", TOY)
    preset = str(presets.save(tmp_path / "mine.json", SETTINGS))
    write(tmp_path / "toy.jsonl", toy_rows(24))
    write(tmp_path / "rte.jsonl", RTE * 4)

    def run(**options):
        given = {"tasks": ("toy",), "data": str(tmp_path), "preset": preset, "batch_size": 8}
        given |= {"head": "linear"} | options
        Tasks(ckpt=tiny_checkpoint, out=tmp_path / "out.json", **given).run()
        return json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_without_training_through_the_harness(run, tiny_checkpoint, capsys):
    """Its prompt and its words, on our rows; the values are those of the logits."""
    pytest.importorskip("lm_eval", reason="comes with the extra lm-eval")
    results = run(tasks=("rte",), head="none")
    task, config = results["tasks"]["rte"], results["config"]
    assert (task["examples"], task["data"]["name"], task["metric"]) == (8, "rte.jsonl", "accuracy")
    assert config["protocol"] == "continuation"
    assert config["quicksilver"] == SETTINGS.to_dict()
    assert results["simulated"] is True
    assert task["dense"]["value"] == pytest.approx(task["metrics"]["acc,none"])
    change = task["quicksilver"]["value"] - task["dense"]["value"]
    assert task["difference"]["value"] == pytest.approx(change)
    assert task["class_shares"] == {"not_entailment": 0.5, "entailment": 0.5}
    answers = [np.argmax(task["per_example"][name], -1) for name in ("dense", "quicksilver")]
    assert task["difference"]["changed"] == (answers[0] != answers[1]).sum()
    tokenizer = qs_jax.load_tokenizer(tiny_checkpoint)
    params, model = qs_jax.load(tiny_checkpoint, dtype="auto")
    pair = RTE[0]["premise"], RTE[0]["hypothesis"]
    prompt = tokenizer("{}\nQuestion: {} True or False?\nAnswer:".format(*pair)).input_ids
    for word, value in zip((" True", " False"), task["per_example"]["dense"][0], strict=True):
        ids = prompt + tokenizer(word, add_special_tokens=False).input_ids
        out = qs_jax.score(params, [ids], qs_jax.Config(model))
        assert out.logprobs[0, len(prompt) :].sum() == pytest.approx(value, abs=1e-3)
    assert 0 < task["quicksilver"]["saved"]["exact_flops_saved"] < 1
    shown = capsys.readouterr().out
    assert f"{task['dense']['value']:.3f}" in shown
    assert "McNemar" in shown


def test_without_the_harness(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("harness", "lm_eval_adapter"):
        monkeypatch.delitem(sys.modules, f"qs_jax.evaluation.{name}", raising=False)
    with pytest.raises(InputError, match=re.escape("pip install 'qs-jax[lm-eval]'")):
        run(head="none")


def test_a_fitted_head(run, capsys):
    results = run(l2=0.01)
    task = results["tasks"]["toy"]
    assert task["examples"] + task["train"]["used"] == 24
    assert task["fit"]["gradient_norm"] < 1e-3
    printed = capsys.readouterr().err
    assert "toy, dense" in printed
    assert "toy, preset" in printed
    with pytest.raises(InputError, match="--overwrite"):
        run()


@pytest.mark.slow
def test_scores_do_not_depend_on_the_devices(run):
    one, three = (run(l2=0.01, devices=n, overwrite=True)["tasks"]["toy"] for n in ("1", "3"))
    for name, scores in one["per_example"].items():
        np.testing.assert_allclose(three["per_example"][name], scores, atol=1e-3)


def test_a_stored_head(run, tiny_checkpoint, tmp_path, capsys):
    backbone = read_manifest(tiny_checkpoint)["model"]["weights"]
    weight = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    head = Head(weight, np.zeros(2, np.float32), ("true", "false"), backbone)
    (tmp_path / "head").mkdir()
    head.save(tmp_path / "head")
    task = run(head=str(tmp_path / "head"))["tasks"]["toy"]
    tokenizer = qs_jax.load_tokenizer(tiny_checkpoint)
    params, model = qs_jax.load(tiny_checkpoint)
    for row, found in zip(toy_rows(24)[:2], task["per_example"]["dense"], strict=False):
        ids = tokenizer(row["text"], row["question"]).input_ids
        out = qs_jax.score(params, [ids], qs_jax.Config(model), return_states=True)
        np.testing.assert_allclose(found, (weight @ out.states[0, -1])[::-1], atol=1e-4)
    capsys.readouterr()
    dense = run(head=str(tmp_path / "head"), preset="off", limit=20, overwrite=True)
    assert dense["simulated"] is False
    assert dense["tasks"]["toy"]["data"]["used"] == 20
    assert "quicksilver" not in dense["tasks"]["toy"]
    assert "McNemar" not in capsys.readouterr().out
    dataclasses.replace(head, backbone="another").save(tmp_path / "head")
    with pytest.raises(InputError, match="was trained with another model"):
        run(head=str(tmp_path / "head"), overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("toy", "squad")}, "--tasks squad: the tasks are mnli"),
        ({"tasks": ()}, "the tasks are mnli"),
        ({"tasks": ("toy", "rte"), "data": __file__}, "for several tasks give their folder"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"head": "linear"}, r"write \./linear for the file or folder"),
        ({"devices": "9"}, "devices must be 'all' or between 1 and 4"),
    ],
)
def test_mistakes(run, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / options.get("head", "other")).mkdir()
    with pytest.raises((InputError, ConfigError), match=message):
        run(**options)
    assert not (tmp_path / "out.json").exists()
