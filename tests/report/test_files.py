"""Results and searches as they come from their commands; and files that are none."""

import json

import numpy as np
import pytest

import qs_jax
from qs_jax import Config, accounting, report, testing
from qs_jax.errors import InputError
from qs_jax.evaluation.perplexity import results
from tests.report.support import Page

pytestmark = pytest.mark.xdist_group("report")
SEARCH = {
    "preset": {
        "provenance": {
            "objective": "exact_flops",
            "max_ppl_increase": 0.2,
            "calibrated_on": "toy",
            "protocol": "continuation",
        }
    },
    "points": [
        {"family": "skip", "saving": 0.1, "ppl_increase": 0.05, "levels": [0]},
        {"family": "extrapolate", "saving": 0.2, "ppl_increase": 4.0, "levels": [1]},
    ],
    "front": [{"family": "skip", "saving": 0.1, "ppl_increase": 0.05, "levels": [0]}],
    "verified": [
        {"family": "skip", "exact_flops_saved": 0.09, "ppl_increase": 0.1, "upper_bound": 0.15}
    ],
}


def written(path, content):
    path.write_text(json.dumps(content))
    return path


def results_file(path, entry, model, **config):
    """What `evaluate` writes, from one scored batch."""
    told = results([entry], engine=None if config["preset"] == "off" else "masked")
    config |= {"data": "toy", "dtype": "float32", "engine": "masked"}
    return written(path, told | {"config": config, "model": {"config": model.to_dict()}})


@pytest.fixture(scope="module")
def evaluated(case, tmp_path_factory):
    run, path = case.run("HKFQ"), tmp_path_factory.mktemp("evaluated") / "results.json"
    entry = {
        "nll": [-float(run.logprobs.sum())],
        "tokens": [int(run.mask.sum())],
        "counts": accounting.tally(run.record, case.model, run.quicksilver),
    }
    config = {"preset": "tiny", "protocol": "teacher-forced", "seq_len": 39}
    return results_file(path, entry, case.model, **config)


def test_results_of_evaluate(case, evaluated):
    found, run = report.read_results(evaluated), case.run("HKFQ")
    assert found["perplexity"] == pytest.approx(run.perplexity)
    counted = accounting.tally(run.record, case.model, run.quicksilver)
    assert sum(found["costs"].values()) == pytest.approx(counted["prefill"]["exact_flops"])
    assert found["dense_flops"] == counted["prefill"]["exact_flops_dense"]
    assert found["per_layer"]["layer_tokens"] == run.record.active.sum((1, 2)).tolist()
    assert found["tokens"] == len(case.ids)
    assert found["simulated"]
    decay = case.report().text.presets[0].runs[-1].record.active.sum((1, 2))
    assert found["decay"]["rate"] > 0
    assert decay[0] > decay[-1]


def test_under_continuation_the_layers_are_the_prompts(case, tmp_path):
    model, lengths = testing.tiny_model(), np.array([20, 20])
    cfg = Config(model=model, protocol="continuation", continuation_tokens=8)
    scored = qs_jax.score(testing.tiny_params(model), np.full((2, 20), 5, np.int32), cfg)
    counts = accounting.dense_tally(lengths, lengths - 8, model)
    entry = {"nll": (-scored.logprobs.sum(1)).tolist(), "tokens": [8, 8], "counts": counts}
    config = {"preset": "off", "protocol": "continuation", "seq_len": 20}
    found = report.read_results(results_file(tmp_path / "dense.json", entry, model, **config))
    assert found["tokens"] == 24
    assert found["per_layer"]["layer_tokens"] == [24, 24, 24]
    assert found["decay"] == {"start": 24.0, "rate": 0.0, "r_squared": None}
    assert sum(found["costs"].values()) == pytest.approx(found["dense_flops"])


def test_a_search(tmp_path):
    front = report.read_front(written(tmp_path / "a.search.json", SEARCH))
    assert front["budget"] == 0.2
    assert front["points"][1] == {"family": "extrapolate", "saving": 0.2, "ppl_increase": 4.0}
    assert front["verified"][0]["saving"] == 0.09


def test_a_page_of_files_only(evaluated, tmp_path):
    front = report.read_front(written(tmp_path / "a.search.json", SEARCH))
    page = report.Report("Files", {}, None, [report.read_results(evaluated)], front)
    told = Page(report.render(page))
    assert told.data["text"] is None
    assert told.data["front"]["points"] == front["points"]
    assert told.data["results"][0]["file"] == "results.json"


@pytest.mark.parametrize(
    ("read", "told"),
    [
        (report.read_results, "results file of `python -m qs_jax evaluate`"),
        (report.read_front, "search of `python -m qs_jax calibrate`"),
    ],
)
def test_files_that_are_something_else(read, told, tmp_path):
    with pytest.raises(InputError, match=f"is not a {told}.*it has no"):
        read(written(tmp_path / "other.json", {"unknown": 1}))
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="not an object"):
        read(written(tmp_path / "list.json", [1]))
