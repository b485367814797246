"""Calibration: bounds, the walk over the front, whole searches on a tiny model, mistakes."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

import qs_jax
from convert.flax_to_hf import hf_tensors
from convert.hf_to_flax import convert
from qs_jax import cli, presets
from qs_jax.calibration import climb, families, search
from qs_jax.calibration.observe import observe
from qs_jax.engine import score as scoring
from qs_jax.testing import tiny_model, tiny_params
from tests.convert.folders import LLAMA_CONFIG, write_folder
from tests.support import GPT2, random_tokens

WINDOWS, WIDTH, CONTINUED = 12, 60, 12


# One worker: its tests share what they measure.
pytestmark = pytest.mark.xdist_group("search")


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=6)


@pytest.fixture(scope="module")
def params(model):
    return tiny_params(model, scale=3.0)


@pytest.fixture(scope="module")
def text(model, params):
    """Text of the model itself, sampled: its perplexity is that of a language model."""
    cfg = qs_jax.Config(model, max_new_tokens=WIDTH - 2, temperature=1.0, eos_token_ids=())
    starts = np.random.default_rng(0).integers(2, model.vocab_size, (WINDOWS, 2), np.int32)
    return np.array(qs_jax.generate(params, starts, cfg).sequences, np.int32)


@pytest.fixture(scope="module")
def cfg(model):
    return qs_jax.Config(model, continuation_tokens=CONTINUED)


def scores(nll, tokens=10):
    nll = np.asarray(nll, float)
    return climb.Scores(nll, np.full(len(nll), tokens), {})


def test_the_bound_of_a_constant_difference_is_that_difference():
    dense = scores([1.0, 2.0, 3.0])
    worse = scores([1.1, 2.1, 3.1])
    expected = math.exp(2.1) - math.exp(2.0)
    assert climb.upper_bound(worse, dense, 0.95) == pytest.approx(expected)
    assert climb.upper_bound(scores([1.1]), scores([1.0]), 0.95) == math.inf


def test_the_bound_covers_as_often_as_it_says():
    """Windows drawn anew 4,000 times: the true increase is under the bound in 90 % of draws."""
    rng = np.random.default_rng(0)
    true = 0.05
    hits = 0
    for _ in range(4000):
        dense_W = rng.normal(2.0, 1.0, 8)
        dense, worse = scores(dense_W), scores(dense_W + rng.normal(true, 0.2, 8))
        hits += climb.upper_bound(worse, dense, 0.9) >= dense.perplexity * math.expm1(true)
    assert 0.885 < hits / 4000 < 0.915


def space_of(model):
    return families.Space(qs_jax.KVSkipConfig("skip"), "quota", (2, 3, 4), None, model, fuses=False)


# Saving and price of a share halted by the first, second and third layer: closed forms.
SAVES, PRICES = (0.4, 0.3, 0.2), (3.0, 0.5, 0.1)


def stand_in(task, space, levels):
    """A candidate whose saving and price are sums over the layers of what newly stopped there."""
    stopped = np.diff(np.array([0, *levels[:3]]) / 4)
    saving = float(np.dot(stopped, SAVES))
    price = float(np.dot(stopped**2, PRICES))
    return climb.Point(space.policy, levels, price, {}, saving)


def task_of(budget):
    return climb.Task({}, None, None, None, budget, "exact_flops", 1, ("text",))


def test_the_climb_finds_the_front_and_measures_little(model, monkeypatch):
    """Against every candidate there is: 35 rising schedules."""
    monkeypatch.setattr(climb, "point", stand_in)
    space, task = space_of(model), task_of(0.3)
    found = climb.climb(task, space, 35)
    rising = itertools.combinations_with_replacement(range(5), 3)
    every = [stand_in(task, space, (*levels, 0, 0)) for levels in rising]
    assert len(every) == 35
    best, ours = (
        max(point.saving for point in points if point.cost <= 0.3) for points in (every, found)
    )
    assert ours >= 0.95 * best
    assert len(found) < 25
    front = climb.pareto(every)
    for point in front:
        better = (p for p in every if p.saving >= point.saving)
        assert all(p.cost >= point.cost for p in better)
    assert [p.saving for p in front] == sorted(p.saving for p in front)
    assert len(climb.climb(task_of(10.0), space, 5)) == 5, "it may measure no more"


def test_the_walk_ends_at_the_first_candidate_out_of_budget(model, monkeypatch):
    """A later one that would pass by luck is not looked at."""
    increases = iter([0.05, 0.3, 0.05])
    dense = scores([1.0, 1.0])

    def measured(*_):
        nll = math.log(math.e + next(increases))
        saved = dict.fromkeys(climb.SAVED, 0.1) | {"prefill": {"exact_flops_saved": 0.13}}
        return dataclasses.replace(scores([nll, nll]), saved=saved)

    monkeypatch.setattr(climb, "measure", measured)
    task = task_of(0.1)._replace(dense=dense)
    points = [climb.Point("skip", (level, level, level, 0, 0), 0.0, {}, 0.1) for level in (1, 2, 3)]
    spaces = {"skip": space_of(model)}
    best, entries = climb.verify(task, points, spaces, 0.95)
    assert best == points[0]
    assert [entry["within_budget"] for entry in entries] == [True, False]

    increases = iter([0.05, 0.05, 0.05, 0.2, 0.05, 0.05])  # ours and the other text's, in turn
    best, entries = climb.verify(task, points, spaces, 0.95, also={"web": task})
    assert best == points[0], "the second leaves the budget on the other text only"
    assert [entry["also"]["web"]["within_budget"] for entry in entries] == [True, False]
    assert entries[1]["upper_bound"] <= 0.1


@pytest.mark.parametrize(("measured", "saving"), [(0.3, 0.3), (None, 0.0)])
def test_time_is_an_objective(model, monkeypatch, measured, saving):
    """What was measured is maximised; where no fast engine runs a preset, it saves nothing."""
    flops = dict.fromkeys(climb.SAVED, 0.1) | {"prefill": {"exact_flops_saved": 0.13}}
    found = dataclasses.replace(scores([1.1]), saved=flops)
    monkeypatch.setattr(climb, "measure", lambda *_: found)
    monkeypatch.setattr(climb, "time_saved", lambda *_: measured)
    task = task_of(1.0)._replace(dense=scores([1.0]), objective="time")
    assert climb.point(task, space_of(model), (1, 1, 1, 0, 0)).saving == saving


@pytest.fixture(
    scope="module",
    params=[
        {"fusion": False, "timed_runs": 0, "max_evaluations": 12},
        pytest.param({"timed_runs": 1, "max_evaluations": 25}, marks=pytest.mark.slow),
    ],
)
def generous(request, params, text, cfg):
    """A search with a budget of a tenth of the perplexity; programs compiled; its options."""
    dense = qs_jax.score(params, text, cfg.replace(protocol="continuation")).perplexity
    before = scoring._jit_masked._cache_size()
    options = {"data": ("first", "second")} | request.param
    found = search(params, text, cfg, max_ppl_increase=dense / 10, **options)
    return found, dense, scoring._jit_masked._cache_size() - before, options


def test_a_calibrated_preset_keeps_its_budget_on_windows_it_never_saw(generous, params, text, cfg):
    """Scored again through the public call, by the engine that really leaves work out."""
    found, dense, _, options = generous
    verified = found.preset.provenance["verified"]
    assert not found.preset.is_off
    assert verified["upper_bound"] <= dense / 10
    fast = cfg.replace(protocol="continuation", quicksilver=found.preset, engine="compact")
    rows = text[WINDOWS // 2 :]
    worse = qs_jax.score(params, rows, fast)
    plain_cfg = fast.replace(quicksilver=None)
    plain = qs_jax.score(params, rows, plain_cfg)
    assert worse.perplexity - plain.perplexity == pytest.approx(
        verified["ppl_increase"], abs=1e-3 * plain.perplexity
    )
    assert worse.record.layer_tokens_saved == pytest.approx(
        verified["layer_tokens_saved"], abs=1e-6
    )
    for at, name in enumerate(("first", "second")):  # their windows take turns
        measured = verified["texts"][name]
        ours, alone = (qs_jax.score(params, rows[at::2], c) for c in (fast, plain_cfg))
        assert alone.perplexity == pytest.approx(measured["dense_perplexity"], rel=1e-4)
        assert ours.perplexity - alone.perplexity == pytest.approx(
            measured["ppl_increase"], abs=1e-3 * plain.perplexity
        )
    assert verified["exact_flops_saved"] > 0
    assert (verified["measured_time_saved"] is not None) == (options["timed_runs"] > 0)
    assert verified["windows"] == WINDOWS // 2


def test_a_search_compiles_once_for_each_program_and_its_front_rises(generous):
    """Quotas and thresholds are numbers: with fusion and without, at whole and last batches."""
    found, _, compiled, options = generous
    fuses = options.get("fusion", True)
    assert len(found.points) > (15 if fuses else 10)
    assert compiled <= 2 * (2 if fuses else 1)
    savings = [point.saving for point in found.front]
    prices = [point.cost for point in found.front]
    assert savings == sorted(savings)
    assert prices == sorted(prices)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_a_budget_that_nothing_meets_gives_off(params, text, cfg):
    preset = qs_jax.calibrate(
        params, text, cfg, max_ppl_increase=1e-9, max_evaluations=4, fusion=False
    )
    assert preset.is_off
    assert "off" in preset.provenance["verified"]["reason"]


@pytest.mark.slow
def test_teacher_forced_thresholds_come_from_percentiles(params, text, cfg):
    plain = {"fusion": False, "timed_runs": 0, "layers": (3, 5), "objective": "layer_tokens"}
    forced = cfg.replace(protocol="teacher-forced")
    found = search(params, text, forced, max_ppl_increase=1e6, max_evaluations=8, **plain)
    halting = found.preset.halting
    assert halting.rule == "dual"
    layer = halting.layers[0]
    at = [found.observed.at("drift", p)[layer - 1] for p in (25, 50, 75, 90)]
    assert halting.tau_drift[layer - 1] in at
    assert found.preset.provenance["verified"]["layer_tokens_saved"] > 0


@pytest.mark.slow
def test_bytes_of_the_cache_are_an_objective(params, text, cfg):
    """What the account says is what `generate` allocates."""
    options = {"objective": "kv_bytes", "fusion": False, "timed_runs": 0, "max_evaluations": 8}
    found = search(params, text, cfg, max_ppl_increase=1e3, layers=(3, 5), **options)
    assert {point.family for point in found.points} == {"skip"}
    qs = found.preset
    assert (qs.amq.targets, qs.amq.execution, qs.amq.layer) == (("kv",), "int8", 1)
    assert qs.halting is not None
    saved = qs.provenance["verified"]["kv_bytes_saved"]
    assert 0.3 < saved < 1
    prompts = text[:2, :-CONTINUED]
    dense, small = (
        qs_jax.generate(params, prompts, qs_jax.Config(cfg.model, each, max_new_tokens=CONTINUED))
        for each in (None, qs)
    )
    assert 1 - small.kv_bytes / dense.kv_bytes == pytest.approx(saved, abs=0.1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_ppl_increase": 0.0}, qs_jax.ConfigError, "must be greater than 0"),
        ({"max_ppl_increase": float("nan")}, qs_jax.ConfigError, "must be a number"),
        ({"objective": "speed"}, qs_jax.ConfigError, "objective must be one of"),
        ({"confidence": 1.0}, qs_jax.ConfigError, "confidence must be less than 1"),
        ({"policies": ("extrapolate",)}, qs_jax.ConfigError, "needs maps"),
        ({"policies": ("attended",)}, qs_jax.ConfigError, "threshold of its own"),
        ({"layers": (6,)}, qs_jax.ConfigError, "layers must be between 1 and 5"),
        ({"max_evaluations": 0}, qs_jax.ConfigError, "max_evaluations must be at least 1"),
        ({"verify_share": 0.1}, qs_jax.InputError, "too few"),
    ],
)
def test_bad_settings(params, text, cfg, changes, error, message):
    settings = {"max_ppl_increase": 1.0, "max_evaluations": 1} | changes
    with pytest.raises(error, match=message):
        search(params, text, cfg, **settings)


def test_windows_must_fit(params, text, cfg):
    with pytest.raises(qs_jax.InputError, match="no prompt before"):
        qs_jax.calibrate(params, text[:, :CONTINUED], cfg, max_ppl_increase=1.0)
    ragged = [row[: len(row) - index] for index, row in enumerate(text.tolist())]
    with pytest.raises(qs_jax.InputError, match="one length"):
        qs_jax.calibrate(params, ragged, cfg, max_ppl_increase=1.0)
    with pytest.raises(qs_jax.InputError, match="too short to observe"):
        observe(params, text[:, :2], cfg.model)


def command(ckpt, folder, characters, *flags):
    sentences = "the quick brown fox jumps over the dog; " * 400
    (folder / "text.txt").write_text(sentences[:characters])
    command = ["calibrate", "--ckpt", str(ckpt), "--data", str(folder / "text.txt")]
    command += ["--out", str(folder / "preset.json"), "--seq-len", "48"]
    command += ["--continuation-tokens", "8", "--windows", "4", "--verify-windows", "4"]
    return cli.main([*command, *flags])


@pytest.mark.slow
def test_it_writes_a_preset_that_evaluate_takes(tiny_checkpoint, tmp_path, capsys):
    flags = ["--max-ppl-increase", "1e6", "--fit-windows", "16", "--max-evaluations", "6"]
    flags += ["--policies", "skip", "extrapolate", "--passkeys", "0"]
    assert command(tiny_checkpoint, tmp_path, 3000, *flags, "--timed-runs", "0") == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "preset.json").read_text())
    verified = content["provenance"]["verified"]
    names = {"ppl_increase", "upper_bound", "exact_flops_saved", "paper_flops_saved"}
    assert names | {"measured_time_saved", "data", "windows"} <= set(verified)
    assert "preset.json" in printed
    searched = json.loads((tmp_path / "preset.search.json").read_text())
    assert {point["family"] for point in searched["points"]} == {"skip", "extrapolate"}
    evaluate = ["evaluate", "--ckpt", str(tiny_checkpoint), "--data", str(tmp_path / "text.txt")]
    evaluate += ["--preset", str(tmp_path / "preset.json"), "--out", str(tmp_path / "out.json")]
    evaluate += ["--seq-len", "48", "--continuation-tokens", "8", "--limit-windows", "8"]
    assert cli.main(evaluate) == 0
    extrapolates = content["quicksilver"]["kv_skip"]["policy"] == "extrapolate"
    assert (tmp_path / "preset.kv_maps.safetensors").exists() == extrapolates
    _, model = qs_jax.load(tiny_checkpoint)
    assert presets.load(tmp_path / "preset.json", model).halting is not None
    for field, value in (("num_layers", 2), ("hidden_size", 64), ("vocab_size", 50)):
        with pytest.raises(qs_jax.ConfigError, match=f"is for models with {field}"):
            presets.load(tmp_path / "preset.json", model.replace(**{field: value}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_light_layers_of_another_model(kind, tmp_path, capsys):
    """From the command to a preset that holds at two lengths, and runs on the prompt engine."""
    model = tiny_model(kind, num_layers=5)
    config = GPT2 | {"model_type": kind, "n_inner": 48, "n_layer": 5}
    config = config if kind == "gpt2" else LLAMA_CONFIG | {"num_hidden_layers": 5}
    source = write_folder(tmp_path / "hf", hf_tensors(tiny_params(model), model), config)
    convert(str(source), tmp_path / "ckpt")
    flags = ["--max-ppl-increase", "1e6", "--fit-windows", "16", "--seq-len", "120", "128"]
    flags += ["--long-windows", "4", "--passkeys", "2", "--prices", "0.001"]
    assert command(tmp_path / "ckpt", tmp_path, 9000, *flags, "--timed-runs", "1") == 0
    assert "agree" in capsys.readouterr().out
    searched = json.loads((tmp_path / "preset.search.json").read_text())
    tried = {tuple(point["levels"]) for point in searched["points"]}
    assert tried == {(2, 4, 0, 0), (3, 4, 0, 0)}
    params, model = qs_jax.load(tmp_path / "ckpt")
    qs = presets.load(tmp_path / "preset.json", model)
    verified = qs.provenance["verified"]
    assert verified["lengths"].keys() == {"120", "128"}
    assert all(each["retrieval"]["lost"] == 0 for each in verified["lengths"].values())
    assert qs.recent_tokens_over == ((120, 32),)
    params["kv_maps"] = qs_jax.KVMaps.load(presets.maps_path(tmp_path / "preset.json"))
    cfg = qs_jax.Config(model, qs, engine="compact", continuation_tokens=8)
    for width, stopping in ((120, 60), (128, 67)):
        record = qs_jax.score(params, random_tokens(model, 1, width), cfg).record
        assert (record.depth < 5).sum() == stopping


def test_light_layers_need_a_stop(params, text, cfg):
    given = {"max_ppl_increase": 1.0, "fit_tokens": text, "light_from": (4,), "layers": (2, 3)}
    with pytest.raises(qs_jax.ConfigError, match=r"from \[4\], stops at \[2, 3\]"):
        search(params, text, cfg, **given)


@pytest.mark.parametrize(
    ("characters", "flags", "message"),
    [
        (30, [], "has 0 windows of 48 tokens"),
        (600, [], "were asked for"),
        (3000, ["--verify-windows", "1"], "must be at least 2"),
        (3000, ["--data", "a", "b", "--fit-windows", "7"], "--fit-windows must be a multiple of 2"),
        (3000, ["--fit-windows", "-1"], "--fit-windows must be at least 0"),
        (3000, ["--fit-windows", "8"], "a passkey needs at least 116 tokens, got a length of 48"),
    ],
)
def test_mistakes(tiny_checkpoint, tmp_path, capsys, characters, flags, message):
    flags = ["--max-ppl-increase", "0.2", *flags]
    assert command(tiny_checkpoint, tmp_path, characters, *flags) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "preset.json").exists()
