"""The figures for papers: every one is drawn, with the numbers of the run."""

import pytest

from qs_jax.report import figures, measures

pytestmark = pytest.mark.xdist_group("report")
NAMES = "halting_timeline kv_writes fusion_flow bit_widths entropy_by_layer drift_curves".split()


@pytest.fixture(scope="module")
def saved(whole, tmp_path_factory):
    return figures.save(whole, tmp_path_factory.mktemp("figures") / "out")


def test_every_figure_in_both_formats(saved):
    names = {path.name for path in saved}
    figures = ["results-1.active_tokens", "pareto_front", "tiny.active_tokens"]
    figures += [f"tiny.{name}" for name in NAMES]
    assert names == {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    for path in saved:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in head


def test_fit_and_tokens_are_written_as_they_are(case, saved):
    decay = measures.fit_decay(case.run("HKFQ").record.active.sum((1, 2)))
    text = next(p for p in saved if p.name == "tiny.active_tokens.svg").read_text()
    assert f"{decay['start']:.1f} exp(-{decay['rate']:.4f} l)" in text
    assert "simulated" in text
    text = next(p for p in saved if p.name == "tiny.halting_timeline.svg").read_text()
    assert "$x_1$ &lt;b&gt;" in text


def test_names_are_no_formulas(tmp_path):
    figures.active_tokens([3, 2, 1], "a$b", "$x_{$ \udcff").savefig(tmp_path / "a.svg")
