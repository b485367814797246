"""The figures for papers: they are there, say what the numbers say, and name a missing extra."""

import sys

import pytest

from qs_jax import report
from qs_jax.errors import InputError
from qs_jax.report import figures, measures
from tests.report.test_files import SEARCH, written

pytestmark = pytest.mark.xdist_group("report")
TEXT = (
    "halting_timeline kv_writes fusion_flow bit_widths entropy_by_layer drift_curves active_tokens "
    "cost"
).split()


@pytest.fixture(scope="module")
def saved(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    front = report.read_front(written(folder / "a.search.json", SEARCH))
    labels = ["$x_1$ <b>", *report.labels(case.tokenizer, case.ids.tolist())[1:]]
    whole = case.report(labels, front=front)
    return figures.save(whole, folder / "out")


def test_every_figure_in_both_formats(saved):
    names = {path.name for path in saved}
    for figure in (*(f"tiny.{name}" for name in TEXT), "pareto_front"):
        assert {f"{figure}.png", f"{figure}.svg"} <= names
    for path in saved:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in head


def test_the_fit_is_stated(case, saved):
    decay = measures.fit_decay(case.run("HKFQ").record.active.sum((1, 2)))
    text = next(p for p in saved if p.name == "tiny.active_tokens.svg").read_text()
    assert f"{decay.start:.1f} exp(-{decay.rate:.4f} l)" in text
    assert "simulated" in text


def test_tokens_stand_under_the_maps_as_they_are(saved):
    text = next(p for p in saved if p.name == "tiny.halting_timeline.svg").read_text()
    assert "$x_1$ &lt;b&gt;" in text


def test_a_missing_extra_is_named(case, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"qs-jax\[plots\]") as caught:
        figures.save(case.report(), tmp_path)
    assert "\n" not in str(caught.value)
