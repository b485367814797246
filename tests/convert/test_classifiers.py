"""Sequence classifiers: the head has the guards of every other weight, both ways."""

import json

import ml_dtypes
import numpy as np
import pytest

from convert import flax_to_hf
from convert.hf_to_flax import convert
from qs_jax.evaluation.heads import Head
from tests.convert.folders import LLAMA_CONFIG, refused, write_folder

SCORE = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
NAMED = {"id2label": {"0": "neg", "1": "neutral", "2": "pos"}}


def write_classifier(folder, tensors, score=SCORE, **settings):
    backbone = {name: t for name, t in tensors.items() if name != "lm_head.weight"}
    config = LLAMA_CONFIG | {"architectures": ["LlamaForSequenceClassification"]} | NAMED
    return write_folder(folder, backbone | {"score.weight": score}, config | settings)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64])
def test_heads_of_every_float_come_and_go_exactly(tmp_path, tensors, dtype):
    source = write_classifier(tmp_path / "hf", tensors, SCORE.astype(dtype))
    convert(str(source), tmp_path / "ckpt", classifier=True, dtype="bfloat16")
    head = Head.load(tmp_path / "ckpt")
    expected = SCORE.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(head.weight_CD, expected)
    assert head.labels == ("neg", "neutral", "pos")
    flax_to_hf.export(tmp_path / "ckpt", tmp_path / "back")
    convert(str(tmp_path / "back"), tmp_path / "again", classifier=True, dtype="bfloat16")
    again = Head.load(tmp_path / "again")
    np.testing.assert_array_equal(again.weight_CD, expected)
    assert (again.labels, again.backbone) == (head.labels, head.backbone)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (SCORE.astype(np.int32), "score.weight: I32 is not implemented"),
        (SCORE.astype(ml_dtypes.float8_e4m3fn), "score.weight: F8_E4M3 is not implemented"),
        (SCORE * np.float32(np.inf), "score.weight holds NaN or infinite"),
        (SCORE[:1], "the head has 1 class(es)"),
        (SCORE[:2], "id2label names ['0', '1', '2'], the head has 2 classes"),
        (SCORE[0], "score.weight: [32], expected [32, 32]"),
    ],
)
def test_heads_that_cannot_be_used(tmp_path, tensors, score, message):
    source = write_classifier(tmp_path / "hf", tensors, score)
    assert message in refused(source, tmp_path, classifier=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id2label": {"0": "pos", "1": "neg", "2": "Pos"}}, "two classes one label"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label names ['0', '1', '3']"),
        ({"id2label": ["a", "b", "c"]}, "id2label names ['a', 'b', 'c']"),
        ({"id2label": {"0": "a", "1": None, "2": "c"}}, "not text"),
        ({"label2id": {"pos": 0, "neutral": 1, "neg": 2}}, "label2id has pos at 0, id2label at 2"),
        ({"num_labels": 2}, "num_labels is 2"),
        ({"problem_type": "multi_label_classification"}, "'multi_label_classification'"),
        ({"problem_type": "regression"}, "'regression'"),
    ],
)
def test_labels_that_contradict_each_other(tmp_path, tensors, settings, message):
    source = write_classifier(tmp_path / "hf", tensors, **settings)
    assert message in refused(source, tmp_path, classifier=True)


def test_a_classifier_as_a_language_model_names_the_option(tmp_path, tensors):
    source = write_classifier(tmp_path / "hf", tensors)
    for tied in (True, False):
        config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": tied}
        (source / "config.json").write_text(json.dumps(config))
        assert "which --classifier converts" in refused(source, tmp_path)


def test_what_cannot_be_written_back(tmp_path, tensors, capsys):
    ckpt = tmp_path / "ckpt"
    convert(str(write_classifier(tmp_path / "hf", tensors)), ckpt, classifier=True)
    command = ["--ckpt", str(ckpt), "--out", str(tmp_path / "back"), "--quiet"]

    def refused_export(*more):
        assert flax_to_hf.main([*command, *more]) == 1
        assert not (tmp_path / "back").exists()
        return capsys.readouterr().err

    assert "--max-shard-size 5 lumps" in refused_export("--max-shard-size", "5 lumps")
    config = (ckpt / "config.json").read_text()
    (ckpt / "config.json").write_text(json.dumps(json.loads(config) | {"rope_theta": 500.0}))
    assert "config.json is not that of the weights" in refused_export()
    (ckpt / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused_export()
    (ckpt / "config.json").write_text(config)
    head = Head.load(ckpt)
    Head(head.weight_CD, head.bias_C + 1, head.labels, head.backbone).save(ckpt)
    assert "has a bias" in refused_export()
    Head(head.weight_CD, head.bias_C, head.labels, "another").save(ckpt)
    assert "belongs to another checkpoint" in refused_export()
    head.save(ckpt)
    assert flax_to_hf.main(command) == 0
    assert capsys.readouterr().out == ""
