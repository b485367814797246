"""Runs with mechanisms switched by numbers are the runs of their own configurations."""

import dataclasses

import numpy as np
import pytest
import scipy.special
import scipy.stats

import qs_jax
from qs_jax import accounting, report
from qs_jax.config import FusionConfig, HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.errors import InputError
from qs_jax.report import trace
from qs_jax.report.trace import combinations, reduced
from tests.engine.contract import LIGHT
from tests.oracle.comparison import with_maps

pytestmark = pytest.mark.xdist_group("report")
FAST = ("HF", "HKFQ")
ALL = "H F Q HK HF HQ FQ HKF HKQ HFQ HKFQ".split()


def test_kv_skipping_comes_with_halting_only(case):
    assert [run.letters for run in case.runs] == ["", *ALL]
    flags_only = QuickSilverConfig(
        halting=HaltingConfig(freeze=False), kv_skip=KVSkipConfig(), fusion=FusionConfig()
    )
    assert list(combinations(flags_only)) == ["", "F", "HK", "HKF"]


@pytest.mark.parametrize(
    "letters", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ALL]
)
def test_a_run_is_what_score_gives_for_its_settings(case, letters):
    run = case.run(letters)
    cfg = case.cfg.replace(quicksilver=reduced(case.cfg.quicksilver, letters))
    assert run.quicksilver == cfg.quicksilver
    expected = qs_jax.score(case.params, case.ids, cfg)
    np.testing.assert_allclose(run.logprobs, expected.logprobs[0], atol=1e-5)
    np.testing.assert_array_equal(run.mask, expected.mask[0])
    assert run.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    _same(run.record, expected.record)


def test_the_dense_run_is_the_dense_model(case):
    run, length, dense = case.run(""), np.array([len(case.ids)]), case.cfg.replace(quicksilver=None)
    expected = qs_jax.score(case.params, case.ids, dense, return_logits=True)
    np.testing.assert_allclose(run.logprobs, expected.logprobs[0], atol=1e-5)
    _same(run.record, accounting.dense_record(length, np.array([0]), case.cfg.model))
    probabilities_TV = scipy.special.softmax(np.float64(expected.logits[0]), axis=-1)
    entropy_T = scipy.stats.entropy(probabilities_TV, axis=-1)
    np.testing.assert_allclose(run.signals["entropy"][-1], entropy_T, rtol=1e-3)


def _same(record, expected):
    for field in dataclasses.fields(expected):
        actual, wanted = getattr(record, field.name), getattr(expected, field.name)
        if isinstance(wanted, np.ndarray) and wanted.dtype.kind == "f":
            np.testing.assert_allclose(actual, wanted, atol=1e-5, err_msg=field.name)
        else:
            np.testing.assert_array_equal(actual, wanted, err_msg=field.name)


def test_signals_are_those_of_tokens_that_run(case):
    for run in case.runs:
        lens = {"entropy"} if run.letters in ("", "HKFQ") else set()
        assert set(run.signals) == {"drift", "bits_entropy"} | lens
        for name, values in run.signals.items():
            np.testing.assert_array_equal(np.isnan(values), ~run.record.active[:, 0], name)
    run = case.run("HKFQ")
    for name in ("drift", "entropy"):
        recorded = getattr(run.record, name)[:, 0]
        read = ~np.isnan(recorded)
        assert read.any()
        np.testing.assert_allclose(run.signals[name][read], recorded[read], rtol=1e-6)


def test_presets_that_run_token_by_token_are_refused(case):
    halting = HaltingConfig(entropy="final_prev", drift="relative")
    cfg = case.cfg.replace(quicksilver=QuickSilverConfig(halting=halting))
    with pytest.raises(InputError, match="token by token"):
        next(trace(case.params, case.ids, cfg))


def test_a_preset_with_light_layers_is_shown(case):
    """Halting alone cannot be switched on there: its keys come from the maps of the layers."""
    model = case.cfg.model
    halting = dataclasses.replace(LIGHT.halting, light_share=0.5)
    quicksilver = dataclasses.replace(LIGHT, halting=halting, recent_tokens_over=())
    params = with_maps(case.params, model, quicksilver, "continuation", seed=0)
    cfg = case.cfg.replace(quicksilver=quicksilver, protocol="continuation", continuation_tokens=4)
    runs = {run.letters: run for run in trace(params, case.ids, cfg)}
    assert list(runs) == ["", "HK"]
    for letters, qs in (("", None), ("HK", quicksilver)):
        expected = qs_jax.score(params, case.ids, cfg.replace(quicksilver=qs))
        np.testing.assert_allclose(runs[letters].logprobs, expected.logprobs[0], atol=1e-5)
    _same(runs["HK"].record, expected.record)
    assert (runs["HK"].record.depth < model.num_layers).any()
    shown = report.PresetRuns("light", cfg, list(runs.values()), params["kv_maps"].sizes)
    text = report.TextRuns(case.ids, case.ids.astype(str).tolist(), [shown])
    made = report.to_json(report.Report("", {}, text))["text"]["presets"][0]["runs"]
    assert [run["summary"]["light"] for run in made.values()] == [None, [3, 4]]
