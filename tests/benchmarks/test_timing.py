"""Rows in turn, ratios, the sign test, and what a watched call ran."""

import jax
import numpy as np
import pytest
from scipy.stats import binomtest

import qs_jax
from benchmarks import timing
from benchmarks.latency_rows import half_depth
from benchmarks.timing import interval, ratio, run_in_turn, watch
from qs_jax.testing import tiny_model, tiny_params
from qs_jax.timing import Stopwatch
from tests.support import random_tokens


def fakes(names, order):
    """Rows whose time is their place among all runs."""

    def fake(name):
        def run():
            order.append(name)
            return {"seconds": float(len(order))}

        return run

    return {name: fake(name) for name in names}


def test_every_row_runs_between_two_runs_of_its_baseline():
    """Times count the runs: a row's baseline is the mean of the runs of A before and after."""
    order = []
    found = run_in_turn(fakes("Abcd", order), rounds=2, baseline="A")
    assert "".join(order) == "AbcAdA" + "AdcAbA"
    assert found["b"]["runs"]["baseline_seconds"] == [(1 + 4) / 2, (10 + 12) / 2]
    assert found["c"]["runs"]["baseline_seconds"] == [(1 + 4) / 2, (7 + 10) / 2]
    assert found["d"]["runs"]["baseline_seconds"] == [(4 + 6) / 2, (7 + 10) / 2]
    assert ratio(found["c"]) == pytest.approx((3 / 2.5 + 9 / 8.5) / 2)
    assert len(found["A"]["runs"]["seconds"]) == 6
    assert ratio(found["A"]) == 1


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 3), (79, 3), (80, 4), (None, 9)])
def test_rounds_stop_when_time_is_up(monkeypatch, seconds, rounds):
    """A round of A b c A takes 20 seconds."""
    order = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 5.0 * len(order))
    found = run_in_turn(fakes("Abc", order), rounds=9, baseline="A", least=3, seconds=seconds)
    assert len(found["b"]["runs"]["seconds"]) == rounds


@pytest.mark.parametrize("count", [5, 6, 10, 30])
def test_the_interval_is_that_of_the_sign_test(count):
    """Medians inside the interval are those that a sign test on the ratios does not reject."""
    ratios = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    row = {"runs": {"seconds": list(2 * ratios), "baseline_seconds": [2.0] * count}}
    inside = [
        median
        for median in np.arange(0.5, count + 1)
        if binomtest(int((ratios < median).sum()), count).pvalue > 0.05
    ]
    assert interval(row) == ((min(inside) - 0.5, max(inside) + 0.5) if count > 5 else None)


def test_asking_for_memory_compiles_nothing():
    model = tiny_model()
    params = jax.device_put(tiny_params(model), jax.devices()[0])
    cfg = qs_jax.Config(model, half_depth(model), max_new_tokens=3, eos_token_ids=())
    rows_NT = random_tokens(model, 2, 12)
    with watch() as seen, Stopwatch() as first:
        qs_jax.generate(params, rows_NT, cfg)
    with Stopwatch() as second:
        memory = seen.memory()
    assert {"start", "run_until"} <= set(seen.spent)
    assert first.compile > 0
    assert second.compile == 0
    bytes_in = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert memory["argument_bytes"] >= bytes_in
    assert memory["peak_bytes"] >= memory["argument_bytes"] + memory["temp_bytes"]
