"""The page holds the numbers of the records, and any text as data."""

import json
import re

import numpy as np
import pytest

from qs_jax import accounting, report
from qs_jax.report import content, measures
from tests.report.support import LAYERS, Page

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


@pytest.mark.parametrize("letters", ["HF", "HKFQ"])
def test_values_equal_those_of_the_run(case, letters):
    shown, run = Page(report.render(case.report())).run(letters), case.run(letters)
    record = run.record
    layers = {
        "ran": record.active,
        "written": record.kv_written,
        "held": record.kv_held,
        "merged": record.weighed,
        "bits": record.bits,
        "visible": record.visible_keys,
        "fused": record.fused,
    }
    rows = {name: values[:, 0] for name, values in layers.items()} | run.signals
    rows |= {"depth": record.depth[0], "logprobs": run.logprobs}
    acts = record.subject[0] & (np.arange(len(case.ids)) >= case.cfg.quicksilver.sink_tokens)
    rows |= {"scored": run.mask, "eligible": acts}
    for name, expected in rows.items():
        np.testing.assert_array_equal(shown[name], expected, name)
    assert shown["active"] == record.active.sum((1, 2)).tolist()
    saved = accounting.summary(accounting.tally(record, case.cfg.model, run.quicksilver))
    for name in ("exact_flops_saved", "paper_flops_saved", "kv_bytes_saved"):
        assert shown["summary"][name] == pytest.approx(saved[name])
    assert shown["summary"]["perplexity"] == pytest.approx(run.perplexity, rel=1e-5)
    assert shown["summary"]["halted"] == (record.depth < LAYERS).sum()


def test_components_add_up_to_the_exact_count(case):
    for run in case.runs:
        counted = accounting.tally(run.record, case.cfg.model, run.quicksilver)
        exact = counted["prefill"]["exact_flops"] + counted["decode"]["exact_flops"]
        flops = measures.costs(run.record, case.cfg.model, run.quicksilver)
        assert sum(flops.values()) == pytest.approx(exact, rel=1e-9)
        for letter, name in {"H": "halting", "F": "fusion", "Q": "amq"}.items():
            assert (name in flops) == (letter in run.letters)
        assert "signals" not in flops


def test_the_fit_finds_an_exponential():
    layers = np.arange(1, 31)
    expected = {"start": 512, "rate": 0.07, "r_squared": 1}
    assert measures.fit_decay(512 * np.exp(-0.07 * layers)) == pytest.approx(expected)
    assert measures.fit_decay(np.full(12, 40)) == {"start": 40, "rate": 0, "r_squared": None}
    # By hand: least squares of a line through two points is the line.
    assert measures.fit_decay([8, 2])["rate"] == pytest.approx(np.log(4), rel=1e-4)


def test_odd_text_is_data_and_nothing_else(case):
    labels = (ODD * len(case.ids))[: len(case.ids)]
    plain = report.render(case.report())
    odd = report.render(
        case.report(labels, title="<i>T</i> </title><script>", about={"<u>": "<s>"})
    )
    parsed = Page(odd)
    assert parsed.data["text"]["labels"] == labels
    assert parsed.elements == Page(plain).elements
    assert len(re.findall(r"<script\b", odd)) == 2
    assert odd.startswith("<!doctype html>")
    inside = content.embedded({"labels": ODD})
    assert not set(inside) & set("<>&\u2028\u2029")
    assert json.loads(inside) == {"labels": ODD}
    with pytest.raises(ValueError, match="JSON"):
        content.embedded({"value": float("nan")})


def test_nothing_comes_from_elsewhere(case):
    text = report.render(case.report())
    assert "default-src 'none'" in text
    for word in ("http://", "https://", "src=", "@import", "url("):
        assert word not in text.replace("http://www.w3.org/2000/svg", ""), word
