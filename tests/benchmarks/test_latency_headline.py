"""The arithmetic of the headline."""

import numpy as np
import pytest

from benchmarks import latency_headline


def row(*seconds, saved=0.0, tokens_saved=0.0, **more):
    runs = {"seconds": list(seconds), "call_seconds": [2 * value for value in seconds]}
    about = {"exact_flops_saved": saved, "layer_tokens_saved": tokens_saved, "baseline": "dense"}
    return {"runs": runs, "seconds": float(np.median(seconds)), **about, **more}


def test_conversion_is_time_saved_over_flops_saved_round_by_round():
    """The machine is ten times slower in the second round: ratios within a round do not see it."""
    dense = row(1.0, 10.0, 1.0)
    assert latency_headline.conversion(row(0.6, 6.0, 0.6, saved=0.5), dense) == pytest.approx(0.8)
    assert latency_headline.conversion(row(0.5, 5.0, 0.9, saved=0.5), dense) == pytest.approx(1.0)
    assert latency_headline.conversion(row(1.1, 11.0, 1.1, saved=0.5), dense) == pytest.approx(-0.2)
    assert latency_headline.conversion(row(1.0, 10.0, 1.0, saved=-0.01), dense) is None


def constructed():
    """Results whose figures are known."""
    prefill = {
        "dense": row(1.0, 1.0),
        "off": row(1.01, 1.01),
        "unmet thresholds": row(1.02, 1.02),
        "paper, compact": row(1.05, 1.05),
        "aggressive, compact": row(0.9, 0.9, saved=0.2, tokens_saved=0.2),
        "paper, masked": row(1.9, 1.9),
        "paper, decisions only": row(1.045, 1.045),
        "balanced, decisions only": row(1.015, 1.015),
        "active 1": row(1.03, 1.03),
        "active 0.75": row(0.85, 0.85, saved=0.16, tokens_saved=0.15),
        "active 0.5": row(0.7, 0.7, saved=0.32, tokens_saved=0.3),
        "HF sdpa float32": row(1.5, 1.5),
        "HF eager bfloat16": row(1.2, 1.2),
    }
    decode = {
        "dense": row(0.02, 0.02, kv_bytes=1000, kv_skip_rate=0.0),
        "half depth": row(0.01, 0.01, kv_bytes=540, kv_skip_rate=0.5),
        "HF sdpa float32": row(0.05, 0.05),
        latency_headline.READ_ROW: row(0.011, 0.011),
    }
    return {
        "groups": {
            "prefill 4x512": {"section": "prefill", "batch": 4, "length": 512, "rows": prefill},
            "decode 1x128": {"section": "decode", "batch": 1, "length": 128, "rows": decode},
            "decode 1x512": {
                "section": "decode",
                "batch": 1,
                "length": 512,
                "rows": {"dense": row(9.0), "half depth": row(9.0)},
            },
        },
        "deciding": {
            "dense": {"attn": 0.6, "mlp": 0.4},
            "paper": {"attn": 0.7, "signals": 0.02, "halt": 0.004, "fuse": 0.006},
            "balanced": {"attn": 0.7, "signals": 0.01, "head": 0.5},
        },
        "machine": {"bandwidth": 100.0, "gemm_flops": 1.0},
        "about": {"new_tokens": 64, "weight_bytes": 0.2, "kv_bytes_per_token": 0.005},
    }


def test_the_headline_is_the_worst_of_what_it_is_chosen_from():
    found = latency_headline.headline(constructed())
    expected = {
        "conversion_efficiency": 0.15 / 0.16,
        "off_over_dense": 1.01,
        "no_saving_over_dense": 1.05,  # not the masked engine's, which does not try
        "prefill_hf_over_ours": 1.2,
        "decode_ours_over_hf": 2.5,
        "decode_bandwidth_fraction": 0.55,
        "half_depth_decode_speedup": 2.0,  # of the shortest context
        "signal_share": 0.03,  # of the dense time
        "kv_bytes_over_skip_rate": 0.92,
    }
    assert found == pytest.approx(expected)
    verdicts = {name: latency_headline.met(name, value) for name, value in found.items()}
    failed = {name for name, good in verdicts.items() if not good}
    assert failed == {
        "conversion_efficiency",
        "no_saving_over_dense",
        "decode_bandwidth_fraction",
        "signal_share",
    }


def test_shares_are_of_the_best_that_any_run_saw_of_the_machine():
    results = constructed()
    group = results["groups"]["prefill 4x512"]
    group["machine"] = {"bandwidth": 200.0, "gemm_flops": 0.5}
    best = {"bandwidth": 200.0, "gemm_flops": 1.0}
    assert latency_headline.peaks(results) == {latency_headline.UNKNOWN: best}
    other = {"bandwidth": 500.0, "gemm_flops": 9.0}
    results["groups"]["decode 1x128"]["machine"] = other | {"processor": "another"}
    assert latency_headline.peaks(results) == {latency_headline.UNKNOWN: best, "another": other}
    assert latency_headline.peaks({}) == {}


@pytest.mark.parametrize(("count", "from_either_end"), [(5, None), (6, 1), (10, 2), (110, 45)])
def test_the_interval_is_that_of_the_sign_test(count, from_either_end):
    """Ends as in tables of the binomial distribution; the order of runs does not matter."""
    ratios = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    dense = row(*[2.0] * count)
    found = latency_headline.interval(row(*(2 * ratios)), dense)
    if from_either_end is None:
        assert found is None
    else:
        assert found == pytest.approx((from_either_end, count + 1 - from_either_end))


def test_what_was_not_measured_has_no_figure():
    assert set(latency_headline.headline({}).values()) == {None}
    results = constructed()
    del results["groups"]["prefill 4x512"]["rows"]["HF eager bfloat16"]["runs"]
    assert latency_headline.headline(results)["prefill_hf_over_ours"] == pytest.approx(1.5)
