import pytest

from qs_jax import accounting, report
from tests.report.support import SEARCH, Case, make_case, results_file, written


@pytest.fixture(scope="session")
def case() -> Case:
    return make_case()


@pytest.fixture(scope="session")
def evaluated(case, tmp_path_factory):
    run, path = case.run("HKFQ"), tmp_path_factory.mktemp("evaluated") / "results.json"
    entry = {
        "nll": [-float(run.logprobs.sum())],
        "tokens": [int(run.mask.sum())],
        "counts": accounting.tally(run.record, case.cfg.model, run.quicksilver),
    }
    config = {"preset": "tiny", "protocol": "teacher-forced", "seq_len": 39}
    return results_file(path, entry, case.cfg.model, **config)


@pytest.fixture(scope="session")
def whole(case, evaluated) -> report.Report:
    """A report with everything in it."""
    front = report.read_front(written(evaluated.with_name("a.search.json"), SEARCH))
    labels = ["$x_1$ <b>", *report.labels(case.tokenizer, case.ids.tolist())[1:]]
    return case.report(labels, results=[report.read_results(evaluated)], front=front)
