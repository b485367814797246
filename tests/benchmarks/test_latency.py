"""Headline arithmetic in closed form, what rows stop, and a quick run on a tiny model."""

import json

import numpy as np
import pytest

import qs_jax
from benchmarks import environment, latency, latency_figures, latency_rows
from benchmarks.ablation import all_four
from benchmarks.latency_rows import READ_ROW, Group, OurCall, decisions_only, half_depth
from qs_jax.testing import tiny_model, tiny_params
from tests.support import random_tokens
from tests.test_presets import SMOLLM2

# Of the JSON file: programs that read it rely on these names.
KEYS = """conversion_efficiency off_over_dense no_saving_over_dense prefill_hf_over_ours
decode_ours_over_hf decode_bandwidth_fraction half_depth_decode_speedup signal_share
kv_bytes_over_skip_rate groups components components_about deciding deciding_about skipped machine
hf_not_measured about headline_details environment""".split()


def row(seconds, saved=0.0, tokens_saved=0.0, **more):
    """A row whose baseline takes a second, in seven rounds."""
    runs = {"seconds": [seconds] * 7, "call_seconds": [2 * seconds] * 7}
    runs |= {"baseline_seconds": [1.0] * 7, "baseline_call_seconds": [1.0] * 7}
    about = {"exact_flops_saved": saved, "layer_tokens_saved": tokens_saved}
    return {"runs": runs, "seconds": seconds, **about, **more}


def results():
    """A result file whose figures are known."""
    prefill = {
        "dense": row(1.0),
        "off": row(1.01),
        "unmet thresholds": row(1.02),
        "paper": row(1.05),
        "paper, masked": row(1.9),
        "small-cache": row(0.9, saved=0.2, tokens_saved=0.2),
        "active 0.75": row(0.85, saved=0.16, tokens_saved=0.15),
        "active 0.5": row(0.7, saved=0.32, tokens_saved=0.3),
        "HF sdpa float32": row(1.5, tokens_saved=1.0),
        "HF sdpa bfloat16": row(1.2, tokens_saved=1.0),
    }
    decode = {
        "dense": row(1.0, kv_bytes=1000, kv_skip_rate=0.0, dtype="bfloat16"),
        "half depth": row(0.5, kv_bytes=540, kv_skip_rate=0.5),
        "dense, float32": row(2.0, dtype="float32"),
        READ_ROW: row(1.1),
        "HF sdpa float32": row(2.5),
    }
    longer = {"dense": row(9.0), "half depth": row(9.0)}
    deciding = {
        "dense": {"attn": 0.6, "mlp": 0.4},
        "paper": {"attn": 0.7, "signals": 0.02, "halt": 0.004, "fuse": 0.006},
        "balanced": {"attn": 0.7, "signals": 0.01, "head": 0.5},
    }
    found = {"prefill 4x512": prefill, "decode 1x512": longer, "decode 1x128": decode}
    groups = {key: {"rows": rows, "commit": "abc"} for key, rows in found.items()}
    return {"groups": groups, "deciding": deciding, "environment": environment.describe()}


def test_the_headline_is_the_worst_of_what_it_is_chosen_from():
    found = latency_figures.headline(results())
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(
        {
            "conversion_efficiency": 0.15 / 0.16,
            "off_over_dense": 1.01,
            "no_saving_over_dense": 1.05,  # not the masked engine's, which does not try
            "prefill_hf_over_ours": 1.2,
            "decode_ours_over_hf": 5.0,  # of whole calls
            "decode_bandwidth_fraction": 0.55,
            "half_depth_decode_speedup": 2.0,  # of the shortest context
            "signal_share": 0.03,  # of the dense time
            "kv_bytes_over_skip_rate": 0.92,
        }
    )
    assert found["conversion_efficiency"].interval == pytest.approx((0.15 / 0.16, 0.15 / 0.16))
    assert set(latency_figures.headline({}).values()) == {None}
    table = latency_figures.tables(results())["latency headline"]
    missed = [line for line in table.splitlines() if line.endswith("| **no** |")]
    assert [line.split("`")[1] for line in missed] == [
        "conversion_efficiency",
        "no_saving_over_dense",
        "decode_bandwidth_fraction",
        "signal_share",
    ]


def test_the_headline_is_that_of_the_result_file():
    text = (environment.RESULTS / "latency.json").read_text()
    content = json.loads(text)
    assert list(content) == KEYS
    found = latency_figures.headline(content)
    assert {name: figure.value for name, figure in found.items()} == {
        name: content[name] for name in latency_figures.TARGETS
    }


def test_decisions_only_stop_nothing():
    model = tiny_model(num_layers=6)
    params, rows = tiny_params(model), random_tokens(model, width=60)
    qs = decisions_only(all_four(model))
    cfg = qs_jax.Config(model, qs, protocol="continuation", continuation_tokens=4)
    record = qs_jax.score(params, rows, cfg.replace(engine="masked")).record
    assert record.layer_tokens_saved == 0
    assert record.kv_held.sum() == 6 * rows.size
    assert (record.representative == np.arange(60)).all()


def test_presets_with_light_layers_have_rows_but_none_that_only_decides():
    rows = latency_rows.rows("prefill", SMOLLM2, ("paper", "balanced", "small-cache"), 4)
    assert {"paper", "balanced", "small-cache", "small-cache, decisions only"} <= set(rows)
    assert "balanced, decisions only" not in rows


def test_a_decode_is_what_follows_the_program_of_the_first_token():
    model = tiny_model(num_layers=3)
    params, rows = tiny_params(model), random_tokens(model, width=9)
    cfg = qs_jax.Config(model, half_depth(model), max_new_tokens=5, eos_token_ids=())
    call = OurCall(params, rows, "decode", cfg)
    told = call.warm()
    assert 0 < told["exact_flops"] < told["exact_flops_dense"]
    assert told["kv_skip_rate"] == pytest.approx(2 / 3)
    assert told["memory"]["peak_bytes"] > told["memory"]["argument_bytes"] > 0
    times = call()
    assert 0 < times["seconds"] <= times["call_seconds"]
    assert times["prefill_seconds"] > 0


@pytest.mark.slow
@pytest.mark.hf
def test_a_quick_run_writes_the_same_keys(tiny_checkpoint, tmp_path, monkeypatch):
    """The whole command on small groups, Hugging Face and profiles included."""
    monkeypatch.setattr(environment, "commit", lambda: "abc1234")

    def small(model, names, new):
        del names
        rows = latency_rows.rows("decode", model, (), new)
        yield Group("decode", 1, 16, {name: rows[name] for name in ("dense", "half depth")})
        rows = latency_rows.rows("prefill", model, (), new)
        names = ("dense", "off", "active 0.5")
        yield Group("prefill", 4, 64, {name: rows[name] for name in names}, False, ends=0.0)

    monkeypatch.setattr(latency_rows, "quick_grid", small)
    out = tmp_path / "quick.json"
    options = ["--ckpt", str(tiny_checkpoint), "--quick", "--out", str(out)]
    options += ["--new-tokens", "4", "--presets", "small-cache"]
    latency.main(options)
    content = json.loads(out.read_text())
    assert list(content) == KEYS
    assert content["half_depth_decode_speedup"] > 0
    assert content["decode_ours_over_hf"] > 0
    assert content["signal_share"] > 0
    decode, prefill = content["groups"]["decode 1x16"], content["groups"]["prefill 4x64"]
    assert len(decode["rows"]["half depth"]["runs"]["seconds"]) == 7
    assert len(prefill["rows"]["active 0.5"]["runs"]["seconds"]) == 2  # its time was up
    assert {READ_ROW, "HF sdpa float32", "HF sdpa bfloat16"} < set(decode["rows"])

    decode["rows"]["dense"]["seconds"] = 123.0
    out.write_text(json.dumps(content))
    latency.main(options)  # what this commit has measured stays
    again = json.loads(out.read_text())["groups"]["decode 1x16"]
    assert again["rows"]["dense"]["seconds"] == 123.0
    with pytest.raises(SystemExit, match="holds other measurements"):
        latency.main([*options, "--new-tokens", "5"])
