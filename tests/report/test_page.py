"""What the page holds equals the records, in any script, whatever it says."""

import json

import numpy as np
import pytest

import qs_jax
from qs_jax import accounting, report
from qs_jax.report import content, measures, page
from tests.report.support import LAYERS, Page, scripts_of

pytestmark = pytest.mark.xdist_group("report")
ODD = [
    "</script><script>alert(1)</script>",
    "<!-- ",
    "<b>bold</b> & &amp; \"double\" 'single' `tick` ${1} {{ 2 }} {% raw %}",
    "👩‍👩‍👧 🏳️‍🌈 ❤️",
    "مرحبا بالعالم",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 20,
    "\u2028\u2029\u202e\x00\n\t\\",
]


@pytest.fixture(scope="module")
def shown(case):
    return Page(report.render(case.report()))


@pytest.mark.parametrize("letters", ["HF", "HKFQ"])
def test_values_equal_the_record_of_score(case, shown, letters):
    run = shown.run(letters)
    cfg = case.cfg.replace(quicksilver=case.run(letters).quicksilver)
    scored = qs_jax.score(case.params, case.ids, cfg)
    record = scored.record
    cells = run["cells"]
    for flag, wanted in (
        (1, record.active),
        (2, record.kv_written),
        (4, record.kv_held),
        (8, record.weighed),
    ):
        np.testing.assert_array_equal((cells & flag) > 0, wanted[:, 0])
    np.testing.assert_array_equal(np.array([16, 8, 4, 2])[cells >> 4], record.bits[:, 0])
    np.testing.assert_array_equal(run["depth"], record.depth[0])
    np.testing.assert_array_equal(run["visible"], record.visible_keys[:, 0])
    np.testing.assert_allclose(run["logprobs"], scored.logprobs[0], atol=1e-5)
    np.testing.assert_array_equal(_fused(run["fused"], len(case.ids)), record.fused[:, 0])
    read = ~np.isnan(record.drift[:, 0])
    np.testing.assert_allclose(run["drift"][read], record.drift[:, 0][read], rtol=1e-6)
    assert run["active"] == record.active.sum((1, 2)).tolist()
    saved = accounting.summary(accounting.tally(record, case.model, cfg.quicksilver))
    for name in ("exact_flops_saved", "paper_flops_saved", "kv_bytes_saved"):
        assert run["summary"][name] == pytest.approx(saved[name])
    assert run["summary"]["perplexity"] == pytest.approx(scored.perplexity, rel=1e-5)
    assert run["summary"]["halted"] == (record.depth < LAYERS).sum()


def _fused(changes, width):
    """Replays the changes, layer after layer."""
    fused = np.tile(np.arange(width), (LAYERS, 1))
    for layer, token, into in changes:
        fused[layer - 1 :, token] = into
    return fused


def test_components_add_up_to_the_exact_count(case):
    for run in case.runs:
        counted = accounting.tally(run.record, case.model, run.quicksilver)
        exact = counted["prefill"]["exact_flops"] + counted["decode"]["exact_flops"]
        found = measures.costs(run.record, case.model, run.quicksilver)
        assert sum(found.values()) == pytest.approx(exact, rel=1e-9)
        assert ("halting" in found) == ("H" in run.letters)
        assert ("fusion" in found) == ("F" in run.letters)
        assert ("amq" in found) == ("Q" in run.letters)
        assert "signals" not in found


def test_the_fit_finds_an_exponential():
    layers = np.arange(1, 31)
    decay = measures.fit_decay(512 * np.exp(-0.07 * layers))
    assert decay.start == pytest.approx(512)
    assert decay.rate == pytest.approx(0.07)
    assert decay.r_squared == pytest.approx(1)
    flat = measures.fit_decay(np.full(12, 40))
    assert (flat.start, flat.rate, flat.r_squared) == (40, 0, None)
    # By hand: least squares of a line through two points is the line.
    two = measures.fit_decay([8, 2])
    assert two.rate == pytest.approx(np.log(4), rel=1e-4)


def test_odd_text_is_data_and_nothing_else(case):
    labels = (ODD * len(case.ids))[: len(case.ids)]
    plain = report.render(case.report())
    odd = report.render(
        case.report(labels, title="<i>T</i> </title><script>", about={"<u>": "<s>"})
    )
    told = Page(odd)
    assert told.data["text"]["labels"] == labels
    assert told.elements == Page(plain).elements
    assert len(scripts_of(odd)) == len(scripts_of(plain)) == 2
    assert odd.startswith("<!doctype html>")
    inside = page.embedded({"labels": ODD})
    assert not set(inside) & set("<>&\u2028\u2029")
    assert json.loads(inside) == {"labels": ODD}
    with pytest.raises(ValueError, match="JSON"):
        page.embedded({"value": float("nan")})


def test_nothing_comes_from_elsewhere(case):
    text = report.render(case.report())
    assert "default-src 'none'" in text
    for word in ("http://", "https://", "src=", "@import", "url("):
        assert word not in text.replace("http://www.w3.org/2000/svg", ""), word


def test_a_long_report_keeps_its_signals_in_float16(case, monkeypatch):
    monkeypatch.setattr(content, "EXACT_NUMBERS", 10)
    page = Page(report.render(case.report()))
    assert page.data["text"]["precision"] == "float16"
    drift = case.run("HKFQ").signals["drift"]
    np.testing.assert_array_equal(page.run("HKFQ")["drift"], drift.astype(np.float16))


def test_beyond_a_bound_only_the_ends_keep_their_signals(case, monkeypatch):
    monkeypatch.setattr(content, "MOST_NUMBERS", 10)
    runs = content.to_json(case.report())["text"]["presets"][0]["runs"]
    kept = [letters for letters, run in runs.items() if "drift" in run["arrays"]]
    assert kept == ["", "HKFQ"]
