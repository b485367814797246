"""Rows by hand, synergy in closed form, what is taken apart, and resuming."""

import dataclasses
import json
import math

import numpy as np
import pytest

import qs_jax
from benchmarks import ablation, ablation_figures, ablation_rows, ablation_timing, mechanism_rows
from benchmarks.ablation_rows import Case
from convert.hf_to_flax import convert
from qs_jax import presets
from qs_jax.config import KVSkipConfig, QuickSilverConfig
from qs_jax.errors import ConfigError, InputError
from qs_jax.evaluation.perplexity import cut_windows
from qs_jax.mechanisms.plan import bind
from qs_jax.testing import tiny_model, tiny_params
from tests.convert.folders import llama_tensors, write_folder
from tests.support import random_tokens

LAYERS, WIDTH, TAIL = 6, 80, 16
# One worker: its tests share what they measure.
pytestmark = pytest.mark.xdist_group("ablation")

SHARES = dict.fromkeys((*ablation_figures.SAVED, "added_flops_share"), 0.0)


def scored(*nll, tokens=10, **shares):
    """What a row of these mean losses measures, in nats for each token of a window."""
    saved = {"prefill": SHARES | shares}
    return {"nll": [tokens * x for x in nll], "tokens": [tokens] * len(nll), "saved": saved}


def fitted_for(model):
    """Percentiles that rise with the layer and the percent."""
    percents = [1, 5, 10, 15, 25, 50, 75, 90, 95, 99]
    rows = [[layer + p / 100 for p in percents] for layer in range(1, model.num_layers + 1)]
    return {"percents": percents, "tau_fuse": 2.5} | dict.fromkeys(
        ("drift", "entropy", "distance"), rows
    )


def test_a_row_is_what_a_hand_finds():
    """Two windows: changes of 0.1 and 0.3 nats, so 0.2 +- 12.706 * 0.1 (Student t, 1 degree)."""
    half = QuickSilverConfig(halting=presets.balanced(tiny_model()).halting)
    case = Case("H", "isolated", "balanced", half)
    base = math.log(10)
    measured = scored(base + 0.1, base + 0.3, exact_flops_saved=0.25, kv_bytes_saved=0.5)
    dense = scored(base, base, base + 5)  # a third window that the row was not scored on
    row = ablation_figures.row(case, {"data": "c4", "protocol": "continuation"}, measured, dense)
    assert row["ppl"] == pytest.approx(10 * math.exp(0.2))
    assert row["dense_ppl"] == pytest.approx(10)
    assert row["ppl_increase"] == pytest.approx(10 * (math.exp(0.2) - 1))
    ends = [10 * (math.exp(0.2 + sign * 1.270620473617) - 1) for sign in (-1, 1)]
    assert row["interval"] == pytest.approx(ends)
    assert (row["mechanisms"], row["data"], row["windows"]) == ("H", "c4", 2)
    assert (row["exact_flops_saved"], row["kv_bytes_saved"]) == (0.25, 0.5)
    assert row["seconds"] is None


def test_times_are_ratios_of_neighbours_and_bytes_are_of_the_dense_cache():
    """The machine is ten times slower in the second round, and the ratio does not see it."""
    runs = {"seconds": [0.6, 8.0, 0.7], "baseline_seconds": [1.0, 10.0, 1.0]}
    own = {"runs": runs, "seconds": 0.7, "baseline_seconds": 1.0, "compile_seconds": 3.0}
    own |= {"kv_bytes": 750, "mechanisms": "HK"}
    found = ablation_figures.timed(own, {"kv_bytes": 1000, "seconds": 2.0, "runs": runs})
    assert found == {
        "seconds": 0.7,
        "dense_seconds": 1.0,
        "time_saved": pytest.approx(0.3),
        "compile_seconds": 3.0,
        "kv_bytes_allocated_saved": 0.25,
        "timed_mechanisms": "HK",
    }
    failed = ablation_figures.timed({"not_measured": "why"}, own)
    assert set(failed) == set(found)
    assert set(failed.values()) == {None}


def part(name, kind, saved, **more):
    row = dict.fromkeys(ablation_figures.ADDED_UP) | {"name": name, "kind": kind, "whole": False}
    where = {"settings": "s", "data": "wikitext", "protocol": "continuation"}
    return row | where | {"exact_flops_saved": saved} | more


def test_mechanisms_that_each_leave_a_share_of_the_rest_overlap_by_the_products():
    """1 - (1 - a)(1 - b)(1 - c) - (a + b + c) = abc - ab - ac - bc."""
    a, b, c = 0.2, 0.1, 0.3
    rows = [part("H", "isolated", a), part("F", "isolated", b), part("Q", "isolated", c)]
    rows.append(part("H", "isolated", 0.9, data="c4"))  # another text's
    joint = 1 - (1 - a) * (1 - b) * (1 - c)
    whole = part("H+F+Q", "cumulative", joint, whole=True, time_saved=0.4)
    (found,) = ablation_figures.synergies([*rows, whole])
    assert found["synergy"]["exact_flops_saved"] == pytest.approx(a * b * c - a * b - a * c - b * c)
    assert found["sum_of_parts"]["exact_flops_saved"] == pytest.approx(0.6)
    assert found["parts"]["exact_flops_saved"] == {"H": a, "F": b, "Q": c}
    assert found["synergy"]["time_saved"] is None  # parts were not timed
    assert ablation_figures.synergies([rows[0], whole]) == []  # F and Q are missing


def test_settings_are_taken_apart_into_what_they_have():
    model = tiny_model(num_layers=LAYERS)
    names = {}
    for name in ("balanced", "aggressive"):
        cases = list(ablation_rows.decomposed(name, presets.NAMES[name](model)))
        names[name] = [(case.name, case.kind, case.mechanisms) for case in cases]
        assert [case.whole for case in cases] == [False] * (len(cases) - 1) + [True]
        assert cases[-1].quicksilver == presets.NAMES[name](model)
        for case in cases:
            qs_jax.Config(model, case.quicksilver)  # all of them can run
    alone = [("H", "isolated", "H"), ("K", "isolated", "K")]
    added = [("H", "cumulative", "H"), ("H+K", "cumulative", "HK")]
    assert names["balanced"] == [*alone, *added]
    more = [("F", "isolated", "F"), ("Q", "isolated", "Q")]
    all_of_it = [("H+K+F", "cumulative", "HKF"), ("H+K+F+Q", "cumulative", "HKFQ")]
    assert names["aggressive"] == [*alone, *more, *added, *all_of_it]
    balanced = presets.balanced(model)
    mapped = dataclasses.replace(balanced, kv_skip=KVSkipConfig("extrapolate"))
    found = [case.name for case in ablation_rows.decomposed("mine", mapped)]
    assert found == ["H", "H", "H+K"]  # maps alone do nothing


def test_percentile_settings_take_their_thresholds_at_three_depths():
    model = tiny_model(num_layers=10)
    qs = ablation_rows.full("percentile", model, fitted_for(model))
    assert qs.halting is not None
    assert qs.halting.layers == (4, 6, 8)
    assert qs.halting.tau_drift[5] == 6.25
    assert qs.fusion is not None
    assert qs.fusion.tau_fuse == 2.5
    with pytest.raises(ConfigError, match="unknown preset"):
        ablation_rows.full("nothing", model, fitted_for(model))


def test_the_points_of_a_sweep_share_a_program():
    """Equal static halves are one program; their numbers differ."""
    model = tiny_model(num_layers=10)
    plans, points = {}, {}
    for case in ablation_rows.sweeps(model, fitted_for(model)):
        bound = bind(case.quicksilver, model, "continuation")
        assert bound is not None
        if case.name != "8 bits":  # reads no entropy
            plans.setdefault(case.sweep, set()).add(bound[0])
        points.setdefault(case.sweep, set()).add(ablation_rows.digest(case.quicksilver))
    assert {name: len(found) for name, found in plans.items()} == dict.fromkeys(
        ("halting", "fusion", "quota", "bits"), 1
    )
    assert {name: len(found) for name, found in points.items()} == {
        "halting": 4,
        "fusion": 4,
        "quota": 6,
        "bits": 6,
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    model = tiny_model(num_layers=LAYERS)
    params = tiny_params(model)
    windows = {
        name: cut_windows(random_tokens(model, 2, WIDTH, seed).reshape(-1).tolist(), WIDTH)
        for seed, name in enumerate(("wikitext", "c4"))
    }
    args = ablation.Arguments(
        out=tmp_path_factory.mktemp("ablation") / "whole.json",
        settings=("balanced",),
        windows=2,
        sweep_windows=2,
        continuation_tokens=TAIL,
        batch_size=2,
        sweeps=False,
        timing=False,
    )
    about = {"model": "tiny", "windows": 2}
    return ablation.Job(params, model, windows, random_tokens(model, 2, WIDTH, 9), about, args)


@pytest.fixture(scope="module")
def content(job):
    return ablation.measure(job)


def test_half_of_a_prompt_at_layer_five_of_six(content, job):
    """Of 64 prompt tokens 4 are sinks and 32 recent: 14 of 28 skip one layer of six."""
    rows = {(row["name"], row["kind"], row["data"]): row for row in content["rows"]}
    assert len(rows) == 2 * 4
    whole = rows["H+K", "cumulative", "wikitext"]
    assert whole["layer_tokens_saved"] == pytest.approx(14 / (64 * 6))
    assert whole["kv_bytes_saved"] == pytest.approx(14 / (64 * 6))
    assert rows["H", "isolated", "wikitext"]["kv_bytes_saved"] == 0
    assert rows["K", "isolated", "wikitext"]["layer_tokens_saved"] == 0
    cfg = qs_jax.Config(job.model, presets.balanced(job.model), continuation_tokens=TAIL)
    tokens_WT = job.windows["wikitext"].tokens_WT
    direct = qs_jax.score(job.params, tokens_WT, cfg.replace(engine="masked"))
    dense = qs_jax.score(
        job.params, tokens_WT, cfg.replace(quicksilver=None, protocol="continuation")
    )
    assert whole["ppl"] == pytest.approx(direct.perplexity, rel=1e-6)
    assert whole["ppl_increase"] == pytest.approx(direct.perplexity - dense.perplexity, rel=1e-5)
    texts = [entry["data"] for entry in content["synergy"]]
    assert texts == ["wikitext", "c4"]


def test_a_stopped_run_goes_on_to_the_identical_file(content, job, tmp_path, monkeypatch):
    del content
    again = job._replace(args=dataclasses.replace(job.args, out=tmp_path / "resumed.json"))
    score, calls = ablation.score_row, []

    def failing(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*given)

    monkeypatch.setattr(ablation, "score_row", failing)
    with pytest.raises(KeyboardInterrupt):
        ablation.measure(again)
    there = json.loads(again.args.out.read_text())
    assert len(there["measurements"]) == 3
    ablation.measure(again)
    assert len(calls) == 4 + 5  # dense, H, K and H+K on two texts, the fourth twice
    assert again.args.out.read_bytes() == job.args.out.read_bytes()
    ablation.measure(again)
    assert len(calls) == 9
    with pytest.raises(InputError, match=r"windows differ.*--fresh"):
        ablation.measure(again._replace(about={"model": "tiny", "windows": 3}))
    again.args.out.write_text("[]")
    with pytest.raises(InputError, match="holds no ablation"):
        ablation.measure(again)


def test_what_cannot_run_is_refused_before_anything_runs(job, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "score_row", lambda *_: pytest.fail("scored"))
    args = dataclasses.replace(job.args, protocol="teacher-forced", out=tmp_path / "out.json")
    with pytest.raises(ConfigError, match="ranks a whole prompt"):
        ablation.measure(job._replace(args=args))


@pytest.mark.slow
def test_a_prefill_is_timed_and_its_cache_is_smaller(job):
    rows = job.windows["wikitext"].tokens_WT
    cfg = job.cfg(None, engine="compact", max_new_tokens=1, eos_token_ids=())
    all_at_three = mechanism_rows.quota(3, 1.0, "skip")
    qs = dataclasses.replace(all_at_three, sink_tokens=0, recent_tokens=1, protect_special=False)
    found = ablation_timing.measure(
        job.params, rows, cfg, {"early": (job.params, qs)}, rounds=2, seconds=60
    )
    early = ablation_figures.timed(found["rows"]["early"], found["rows"]["dense"])
    assert early["timed_mechanisms"] == "HK"
    assert early["seconds"] > 0
    assert early["kv_bytes_allocated_saved"] > 0.3  # half of the layers hold one token a row
    assert np.isfinite(early["time_saved"])


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    convert(str(write_folder(folder / "hf", llama_tensors()[0])), folder / "ours")
    return folder / "ours"


def test_texts_are_cut_into_scored_and_fitting_windows(ckpt, tmp_path):
    """One character is one token: three windows of eight are scored, the next two fitted on."""
    wiki, web = tmp_path / "wiki.txt", tmp_path / "C4-sample.jsonl"
    text = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJ"
    wiki.write_text(text)
    web.write_text(json.dumps({"text": text[::-1]}))
    args = ablation.Arguments(ckpt, str(wiki), str(web), windows=3, sweep_windows=2, seq_len=8)
    args = dataclasses.replace(args, fit_windows=2, continuation_tokens=4)
    job = ablation.prepare(args)
    ids = np.array(qs_jax.load_tokenizer(ckpt)(text).input_ids)
    assert list(job.windows) == ["wikitext", "c4"]
    np.testing.assert_array_equal(job.windows["wikitext"].tokens_WT.ravel(), ids[:24])
    np.testing.assert_array_equal(job.windows["c4"].tokens_WT.ravel(), ids[::-1][:24])
    np.testing.assert_array_equal(job.fitting_WT.ravel(), ids[24:40])
    assert job.about["texts"]["c4"]["file"] == "C4-sample.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--windows", "9"], "11 windows of 8 are needed"),
        (["--sweep-windows", "4"], "--sweep-windows must be from 2"),
        (["--c4", "wiki.txt"], "--data and --c4 are both wikitext"),
        (["--data", "nowhere.txt"], "unknown data"),
        (["--seq-len", "4096"], "exceed this model's 128 positions"),
    ],
)
def test_options_that_do_not_fit_are_refused(ckpt, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki.txt").write_text("some words " * 5)
    given = ["--ckpt", str(ckpt), "--data", "wiki.txt", "--windows", "3", "--sweep-windows", "2"]
    given += ["--fit-windows", "2", "--seq-len", "8", "--continuation-tokens", "4", *options]
    with pytest.raises(SystemExit, match=message):
        ablation.main(given)
