"""`python -m qs_jax tasks` on a tiny model: its file, its table, heads, and mistakes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from rich import console

import qs_jax
from benchmarks import tasks as benchmark
from qs_jax import presets
from qs_jax.checkpoint import read_manifest
from qs_jax.commands.tasks import Tasks
from qs_jax.config import HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.errors import ConfigError, InputError
from qs_jax.evaluation import tasks
from qs_jax.evaluation.heads import Head
from tests.evaluation.test_tasks import TOY, toy_rows, write

SETTINGS = QuickSilverConfig(
    halting=HaltingConfig(rule="quota", layers=(1,), quota=(0.5,), entropy=None),
    kv_skip=KVSkipConfig("skip"),
    sink_tokens=0,
    recent_tokens=2,
)


@pytest.fixture
def ckpt(tiny_checkpoint):
    return tiny_checkpoint


@pytest.fixture
def run(ckpt, tmp_path, monkeypatch):
    """Runs the command on 24 rows of a toy task; returns the results."""
    monkeypatch.setattr(console, "detect_legacy_windows", lambda: False)
    monkeypatch.setitem(tasks.TASKS, "toy", dataclasses.replace(TOY, files=("toy",)))
    monkeypatch.setattr(
        presets, "by_name", lambda name, model: SETTINGS if name == "mine" else presets.off(model)
    )
    write(tmp_path / "toy.jsonl", toy_rows(24))

    def run(**options):
        given = {"tasks": ("toy",), "data": str(tmp_path), "preset": "mine", "batch_size": 8}
        command = Tasks(ckpt=ckpt, out=tmp_path / "out.json", **(given | options))
        command.run()
        return json.loads((tmp_path / "out.json").read_text())

    return run


def test_the_file_and_the_table(run, capsys):
    results = run()
    task, config = results["tasks"]["toy"], results["config"]
    assert task["examples"] == 24
    assert task["metric"] == "accuracy"
    assert task["words"] == {"a": [67], "b": [68]}
    assert task["template"] == TOY.template
    assert task["data"]["name"] == "toy.jsonl"
    assert config["protocol"] == "continuation"
    assert config["quicksilver"] == SETTINGS.to_dict()
    assert config["normalize"] == "sum"
    assert results["simulated"] is True
    scores = np.array(task["per_example"]["quicksilver"]["sum"])
    right = scores.argmax(1) == task["per_example"]["label"]
    assert task["quicksilver"]["value"] == pytest.approx(right.mean())
    assert 0 < task["quicksilver"]["saved"]["exact_flops_saved"] < 1
    shown = capsys.readouterr()
    assert f"{task['dense']['value']:.3f}" in shown.out
    assert "McNemar" in shown.out
    assert "toy, dense" in shown.err
    assert "toy, preset" in shown.err
    with pytest.raises(InputError, match="--overwrite"):
        run()
    again = run(devices="3", normalize="pmi", overwrite=True)
    np.testing.assert_allclose(
        again["tasks"]["toy"]["per_example"]["quicksilver"]["sum"], scores, atol=2e-5
    )
    assert again["tasks"]["toy"]["dense"]["value"] == task["dense"]["ways"]["pmi"]["value"]


def test_the_dense_model_alone(run, capsys):
    results = run(preset="off", limit=9)
    assert results["simulated"] is False
    assert results["tasks"]["toy"]["examples"] == 9
    assert "quicksilver" not in results["tasks"]["toy"]
    assert "McNemar" not in capsys.readouterr().out


def test_a_fitted_head(run):
    """The last digit's parity is the class: a linear head on the states finds what words do not."""
    results = run(head="linear", l2=0.01)
    task = results["tasks"]["toy"]
    assert task["examples"] + task["data"]["train_examples"] == 24
    assert task["fit"]["gradient_norm"] < 1e-3
    assert results["config"]["normalize"] is None
    assert set(task["dense"]["ways"]) == {"head"}
    other = run(head="linear", l2=0.01, fit_on="preset", overwrite=True)["tasks"]["toy"]
    assert other["data"]["train_sha256"] == task["data"]["train_sha256"]
    assert other["per_example"]["dense"] != task["per_example"]["dense"]


def test_a_stored_head(run, ckpt, tmp_path):
    backbone = read_manifest(ckpt)["params"]
    weight = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    head = Head(weight, np.zeros(2, np.float32), ("true", "false"), backbone)
    (tmp_path / "head").mkdir()
    head.save(tmp_path / "head")
    task = run(head=str(tmp_path / "head"))["tasks"]["toy"]
    tokenizer, (params, model) = qs_jax.load_tokenizer(ckpt), qs_jax.load(ckpt)
    for row, found in zip(toy_rows(24)[:2], task["per_example"]["dense"]["head"], strict=False):
        ids = tokenizer(row["text"], row["question"]).input_ids
        out = qs_jax.score(params, [ids], qs_jax.Config(model), return_states=True)
        np.testing.assert_allclose(found, (weight @ out.states[0, -1])[::-1], atol=1e-4)
    dataclasses.replace(head, backbone={"crc32": 1}).save(tmp_path / "head")
    with pytest.raises(InputError, match="was trained with another model"):
        run(head=str(tmp_path / "head"), overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("toy", "squad")}, "--tasks squad: the tasks are mnli"),
        ({"tasks": ()}, "the tasks are mnli"),
        ({"data": "nothing.jsonl"}, "no such file"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"devices": "9"}, "devices must be 'all' or between 1 and 4"),
        ({"head": "linear", "train_share": 2.0}, "--train-share"),
    ],
)
def test_mistakes(run, tmp_path, options, message):
    with pytest.raises((InputError, ConfigError), match=message):
        run(**options)
    assert not (tmp_path / "out.json").exists()


def test_one_file_is_one_task(run, tmp_path):
    with pytest.raises(InputError, match="for several tasks give their folder"):
        run(tasks=("toy", "rte"), data=str(tmp_path / "toy.jsonl"))


def test_the_tables_of_the_docs(run, tmp_path):
    """Each marker of the page gets the numbers of the file."""
    found = run()
    made = {"python": "3", "packages": {"jax": "1"}, "processor": "x", "cores": 1, "commit": "y"}
    content = {"zero-shot": found, "linear head": found, "environment": made}
    (tmp_path / "tables.json").write_text(json.dumps(content))
    page = tmp_path / "page.md"
    page.write_text((Path(benchmark.__file__).parents[1] / "docs" / "tasks.md").read_text())
    flags = ["--tables-only", "--out", str(tmp_path / "tables.json"), "--docs", str(page)]
    benchmark.main(flags)
    text, task = page.read_text(), found["tasks"]["toy"]
    assert "Not measured yet" not in text
    assert text.count("| toy | 24 |") == 2
    low, high = task["dense"]["interval"]
    assert f"| {task['dense']['value']:.3f} ({low:.3f} to {high:.3f}) |" in text
    assert "| task | metric | sum | length | pmi |" in text
    assert "toy.jsonl" in text
