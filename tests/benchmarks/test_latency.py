"""Cases, interleaved runs, resuming, the tables on the page, and one small run."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import qs_jax
from benchmarks import (
    latency,
    latency_cases,
    latency_headline,
    latency_hf,
    latency_runs,
    latency_tables,
)
from benchmarks.latency_cases import Case, Group, decisions_only, forced_fraction, half_depth
from convert.hf_to_flax import convert
from qs_jax.presets import NAMES
from qs_jax.testing import tiny_model, tiny_params
from tests.convert.folders import llama_tensors, write_folder
from tests.support import random_tokens

PAGE = Path(latency.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latency")
    convert(str(write_folder(folder / "hf", llama_tensors()[0])), folder / "ours")
    return folder / "ours"


def test_of_each_attention_the_faster_dtype_is_timed():
    seconds = {
        "HF sdpa float32": 3.0,
        "HF eager float32": 2.5,
        "HF sdpa bfloat16": 2.0,
        "HF eager bfloat16": 4.0,
    }
    assert latency_hf.faster_dtype(seconds) == ["HF sdpa bfloat16", "HF eager float32"]


def test_whole_attention_weights_and_whole_logits_are_left_out_where_they_are_too_large():
    """8 x 4,096 logits of a vocabulary of 10^6 and their logarithms would take 328 GB."""
    assert latency_hf.left_out("prefill", "eager", (8, 1024), 97) is None
    reason = latency_hf.left_out("prefill", "eager", (1, 4096), 97)
    assert reason is not None
    assert "attention" in reason
    assert latency_hf.left_out("decode", "sdpa", (8, 4096), 10**6) is None
    assert latency_hf.left_out("scoring", "sdpa", (8, 4096), 97) is None
    reason = latency_hf.left_out("scoring", "sdpa", (8, 4096), 10**6)
    assert reason is not None
    assert "328 GB" in reason
    assert latency_hf.faster_dtype({"HF sdpa float32": 3.0}) == ["HF sdpa float32"]


def test_the_prefills_of_a_decode_are_a_group_of_their_own():
    runs = {"seconds": [1.0, 2.0], "call_seconds": [3.0, 4.0], "prefill_seconds": [5.0, 7.0]}
    beside = {f"baseline_{key}": [10.0, 10.0] for key in runs}
    prefill = {"exact_flops": 80, "exact_flops_saved": 0.2}
    row = {"runs": runs | beside, "exact_flops": 1, "prefill": prefill, "baseline": "dense"}
    reader = {"runs": {"seconds": [1.0], "call_seconds": [1.0]}, "baseline": "dense"}
    rows = {"half": row, "read": reader, "HF eager": {"not_measured": "too large"}}
    found = latency_runs.prefill_of({"rows": rows, "batch": 8, "length": 2, "section": "decode"})
    assert (found["section"], set(found["rows"])) == ("prefill", {"half", "HF eager"})
    half = found["rows"]["half"]
    assert half["seconds"] == 6.0
    assert half["exact_flops_saved"] == 0.2
    assert half["runs"]["seconds"] == [5.0, 7.0]
    assert latency_headline.ratio(half, half) == pytest.approx(0.6)


def test_a_decode_is_what_follows_the_prefill_whether_or_not_they_are_one_program():
    """A clock that adds 8 s to the prefill and 1 s to each step is read the same either way."""
    model = tiny_model(num_layers=3)
    params, rows = tiny_params(model), random_tokens(model, width=9)
    cfg = qs_jax.Config(model, max_new_tokens=5, eos_token_ids=())
    apart = latency_runs.OurRunner(params, rows, "decode", Case("dense", cfg))
    masked = forced_fraction(model, 0.5)
    cfg = cfg.replace(quicksilver=masked, engine="masked")
    whole = latency_runs.OurRunner(params, rows, "decode", Case("masked", cfg))
    for runner, own in ((apart, True), (whole, False)):
        told = runner.warm()
        assert told["prefill"]["exact_flops"] > told["exact_flops"] > 0
        spent = {"start": 8.0, "run_until": 4.0} if own else {"generate_result": 12.0}
        short = {"start": 8.0} if own else {"generate_result": 8.0}

        def timed(cfg, spent=spent, short=short):
            found = short if cfg.max_new_tokens == 1 else spent
            return {"seconds": sum(found.values()), "call_seconds": sum(found.values())}, found

        runner._timed = timed
        expected = {"seconds": 1.0, "call_seconds": 1.0, "prefill_seconds": 8.0}
        assert runner.run() == expected


def test_a_call_that_decodes_spends_time_in_a_program_of_its_prefill():
    model = tiny_model(num_layers=3)
    params, rows = tiny_params(model), random_tokens(model, width=9)
    cfg = qs_jax.Config(model, max_new_tokens=5, eos_token_ids=())
    for qs in (None, half_depth(model)):
        runner = latency_runs.OurRunner(
            params, rows, "decode", Case("row", cfg.replace(quicksilver=qs))
        )
        _, spent = runner._timed(cfg.replace(quicksilver=qs))
        assert {latency_runs.PREFILL, "run_until"} <= set(spent)


def test_long_prompts_are_timed_inside_the_decode():
    model = tiny_model(num_layers=6, max_positions=8192)
    groups = {g.key: g for g in latency_cases.grid(model, ("paper",), (1, 8), (128, 2048), 4)}
    assert "prefill 1x2048" in groups
    assert "prefill 8x512" in groups  # a headline's size, long as it is
    assert "prefill 8x2048" not in groups
    names = [case.name for case in groups["decode 8x2048"].cases]
    shares = [f"active {f}" for f in ("1", "0.75", "0.5", "0.25")]
    assert names == ["dense", "half depth", "paper", *shares]
    assert "scoring 8x2048" in groups


class Fake:
    """A runner whose time is its place among all runs."""

    def __init__(self, name, order):
        self.name, self.order = name, order

    def run(self):
        self.order.append(self.name)
        return {"seconds": float(len(self.order))}


def test_every_row_runs_between_two_runs_of_its_baseline():
    """Times count the runs: a row's baseline is the mean of the runs of A before and after."""
    order = []

    fakes = {name: Fake(name, order) for name in "AbcdZ"}
    beside = dict.fromkeys("Abcd", "A")
    found = latency_runs.interleave(fakes, rounds=2, baselines=beside)
    assert "".join(order) == "AbcAdAZ" + "AdcAbAZ"
    assert [run["baseline_seconds"] for run in found["b"]] == [(1 + 4) / 2, (11 + 13) / 2]
    assert [run["baseline_seconds"] for run in found["c"]] == [(1 + 4) / 2, (8 + 11) / 2]
    assert [run["baseline_seconds"] for run in found["d"]] == [(4 + 6) / 2, (8 + 11) / 2]
    assert latency_headline.ratio(
        latency_runs.summarise(found["c"]), latency_runs.summarise(found["A"])
    ) == pytest.approx((3 / 2.5 + 10 / 9.5) / 2)
    assert len(found["A"]) == 6
    assert "baseline_seconds" not in found["Z"][0]
    order.clear()
    latency_runs.interleave(fakes, rounds=1, baselines=beside, sharing=3)
    assert "".join(order) == "AbcdAZ"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(25, "abccbaabc"), (59, "abccbaabc"), (60, "abccbaabccba")]
)
def test_rounds_alternate_and_stop_when_time_is_up(monkeypatch, seconds, expected):
    order = []

    monkeypatch.setattr(latency_runs.time, "perf_counter", lambda: 5.0 * len(order))
    fakes = {name: Fake(name, order) for name in "abc"}
    found = latency_runs.interleave(fakes, rounds=9, least=3, seconds=seconds)
    assert "".join(order) == expected
    assert {len(runs) for runs in found.values()} == {len(expected) // 3}


@pytest.mark.parametrize(
    "name",
    ["balanced", *(pytest.param(n, marks=pytest.mark.slow) for n in ("paper", "aggressive"))],
)
def test_decisions_only_stop_nothing(name):
    model = tiny_model(num_layers=6)
    params, rows = tiny_params(model), random_tokens(model, width=60)
    qs = decisions_only(NAMES[name](model))
    cfg = qs_jax.Config(model, qs, protocol="continuation", continuation_tokens=4)
    record = qs_jax.score(params, rows, cfg.replace(engine="masked")).record
    assert record is not None
    assert record.layer_tokens_saved == 0
    assert record.kv_held.sum() == 6 * rows.size
    assert (record.representative == np.arange(60)).all()


def test_forced_rows_leave_what_they_say():
    model = tiny_model(num_layers=6)
    params, rows = tiny_params(model), random_tokens(model, width=81)
    one = {"max_new_tokens": 1, "eos_token_ids": (), "engine": "masked"}
    quarter = qs_jax.Config(model, forced_fraction(model, 0.25), **one)
    record = qs_jax.generate(params, rows, quarter).record
    assert record is not None
    np.testing.assert_array_equal(record.active_counts[:, 0], [81] * 2 + [21] * 4)
    half = qs_jax.generate(params, rows, qs_jax.Config(model, half_depth(model), **one)).record
    assert half is not None
    assert half.layer_tokens_saved == pytest.approx(0.5, abs=0.01)


def small_grid(model, *_):
    """Two groups of two rows each; a third is too long for the model."""
    one = {"max_new_tokens": 1, "eos_token_ids": ()}
    dense = Case("dense", qs_jax.Config(model, **one))
    half = qs_jax.Config(model, forced_fraction(model, 0.5), engine="masked")
    more = {"max_new_tokens": 4, "eos_token_ids": ()}
    decode = Case("dense", qs_jax.Config(model, **more)), Case("half", half.replace(**more))
    yield Group("prefill", 4, 64, (dense, Case("half", half.replace(**one))))
    yield Group("decode", 1, 16, decode)
    yield Group("prefill", 1, 4096, (dense,))


@pytest.mark.slow
def test_a_small_run_resumes_and_writes_its_tables(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency.latency_cases, "grid", small_grid)
    monkeypatch.setattr(latency.machine, "gemm_flops", lambda *_: {"jax": 1e9})
    monkeypatch.setattr(latency.machine, "read_bandwidth", lambda: {"jax": 1e9})
    monkeypatch.setattr(latency.environment, "commit", lambda: "abc1234")
    calls, plain = [], latency_runs.measure
    monkeypatch.setattr(
        latency.latency_runs,
        "measure",
        lambda group, *a, **k: calls.append(group.key) or plain(group, *a, **k),
    )
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text("<!-- table: latency prefill -->\n<!-- end -->\n")
    arguments = ["--ckpt", str(ckpt), "--out", str(out), "--page", str(page), "--runs", "3"]
    arguments += ["--only", "prefill", "decode", "--new-tokens", "4"]
    latency.main(arguments)
    assert "decode_ours_over_hf" in capsys.readouterr().out
    assert calls == ["prefill 4x64", "decode 1x16"]
    content = json.loads(out.read_text())
    assert list(content)[: len(latency_headline.TARGETS)] == list(latency_headline.TARGETS)
    assert content["skipped"] == {"prefill 1x4096": "the model has 128 positions"}
    assert content["hf_not_measured"] == "left out by --only"
    rows = content["groups"]["prefill 4x64"]["rows"]
    assert len(rows["half"]["runs"]["seconds"]) == 3
    assert rows["half"]["exact_flops_saved"] > 0.2
    assert rows["dense"]["exact_flops_saved"] == 0
    assert all(r["seconds"] <= r["call_seconds"] for r in rows.values())
    memory = rows["dense"]["memory"]
    weights = content["about"]["weight_bytes"]
    assert memory["peak_bytes"] > memory["argument_bytes"] > weights > 0
    assert "| half |" in page.read_text()

    latency.main(arguments)  # all there
    assert len(calls) == 2
    del content["groups"]["decode 1x16"]
    kept = {"components": {"dense prefill": {"attn": 1.0}}, "components_about": {"batch": 4}}
    out.write_text(json.dumps(content | kept))
    latency.main(arguments)  # what is missing, and no more
    assert calls[2:] == ["decode 1x16"]
    assert json.loads(out.read_text()).items() >= kept.items()
    monkeypatch.setattr(latency.environment, "commit", lambda: "0123456")
    latency.main([*arguments, "--missing"])  # another commit's count
    assert len(calls) == 3
    monkeypatch.setattr(latency.environment, "commit", lambda: "abc1234")
    with pytest.raises(SystemExit, match="holds other measurements"):
        latency.main([*arguments[:-1], "5"])
    monkeypatch.setattr(latency.environment, "commit", lambda: "def5678")
    latency.main(arguments)  # another commit's figures are not this one's
    assert len(calls) == 5


def test_the_tables_on_the_page_are_those_of_the_result_file():
    out = latency.environment.RESULTS / "latency.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    text = PAGE.read_text()
    for name, table in latency_tables.render(results):
        found = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert found is not None, name
        assert found[1] == f"{table}\n", name


@pytest.mark.hf
def test_hugging_face_runs_the_same_weights(ckpt, tmp_path):
    torch = pytest.importorskip("torch")
    params, model = qs_jax.load(ckpt)
    rows = random_tokens(model, width=20)
    models = latency_hf.HuggingFace(ckpt, tmp_path / "hf")
    scores = qs_jax.score(params, rows, qs_jax.Config(model), return_logits=True)
    greedy = qs_jax.generate(params, rows, qs_jax.Config(model, max_new_tokens=5, eos_token_ids=()))
    for attention in latency_hf.ATTENTION:
        runners = {
            section: models.runner(section, rows, 5, (attention, "float32"))
            for section in ("prefill", "scoring", "decode")
        }
        with torch.inference_mode():
            logits = runners["prefill"]._prefill()
            logprobs = runners["scoring"]._score()
            made = runners["decode"]._generate(5)
        assert logits.shape == (2, 1, 97)
        np.testing.assert_allclose(logits[:, 0], scores.logits[:, -1], atol=1e-3)
        np.testing.assert_allclose(logprobs[..., 0], scores.logprobs[:, 1:], atol=1e-3)
        np.testing.assert_array_equal(made[:, 20:], greedy.tokens)
        times = runners["decode"].run()
        assert set(times) == {"seconds", "call_seconds", "prefill_seconds"}
        assert min(times.values()) > 0


def test_the_dtype_of_torch_is_chosen_on_fewer_tokens_where_there_are_many():
    small, large = np.zeros((8, 256), np.int32), np.zeros((8, 512), np.int32)
    assert latency.probe("decode", small).shape == (8, 256)
    assert latency.probe("decode", large).shape == (8, 128)
    assert latency.probe("scoring", large).shape == (1, 512)
