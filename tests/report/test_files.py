"""Results and searches as their commands write them, and files of another kind."""

import numpy as np
import pytest

from qs_jax import accounting, report, testing
from qs_jax.errors import InputError
from tests.report.support import SEARCH, Page, results_file, written

pytestmark = pytest.mark.xdist_group("report")


def test_results_of_evaluate(case, evaluated):
    content, run = report.read_results(evaluated), case.run("HKFQ")
    assert content["perplexity"] == pytest.approx(run.perplexity)
    counted = accounting.tally(run.record, case.cfg.model, run.quicksilver)
    assert sum(content["costs"].values()) == pytest.approx(counted["prefill"]["exact_flops"])
    assert content["dense_flops"] == counted["prefill"]["exact_flops_dense"]
    assert content["per_layer"]["layer_tokens"] == run.record.active.sum((1, 2)).tolist()
    assert content["tokens"] == len(case.ids)
    assert content["simulated"]
    assert content["decay"]["rate"] > 0


def test_under_continuation_the_layers_are_the_prompts(tmp_path):
    model, lengths = testing.tiny_model(), np.array([20, 20])
    counts = accounting.dense_tally(lengths, lengths - 8, model)
    entry = {"nll": [30.0, 31.0], "tokens": [8, 8], "counts": counts}
    config = {"preset": "off", "protocol": "continuation", "seq_len": 20}
    content = report.read_results(results_file(tmp_path / "dense.json", entry, model, **config))
    assert content["tokens"] == 24
    assert content["per_layer"]["layer_tokens"] == [24, 24, 24]
    assert content["decay"] == {"start": 24.0, "rate": 0.0, "r_squared": None}
    assert sum(content["costs"].values()) == pytest.approx(content["dense_flops"])


def test_a_page_of_files_only(evaluated, tmp_path):
    front = report.read_front(written(tmp_path / "a.search.json", SEARCH))
    assert front["budget"] == 0.2
    assert front["points"][1] == {"family": "extrapolate", "saving": 0.2, "ppl_increase": 4.0}
    assert front["verified"][0]["saving"] == 0.09
    files = report.Report("Files", {}, None, [report.read_results(evaluated)], front)
    data = Page(report.render(files)).data
    assert data["text"] is None
    assert data["front"]["points"] == front["points"]
    assert data["results"][0]["file"] == "results.json"


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (report.read_results, "results file of `python -m qs_jax evaluate`"),
        (report.read_front, "search of `python -m qs_jax calibrate`"),
    ],
)
def test_files_that_are_something_else(read, kind, tmp_path):
    with pytest.raises(InputError, match=f"is not a {kind}.*it has no"):
        read(written(tmp_path / "other.json", {"unknown": 1}))
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="not an object"):
        read(written(tmp_path / "list.json", [1]))
