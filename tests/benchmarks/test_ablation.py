"""Changes by hand, and what is taken apart."""

import dataclasses
import math

import pytest

import qs_jax
from benchmarks import ablation, mechanisms
from qs_jax import presets
from qs_jax.config import KVSkipConfig
from qs_jax.testing import tiny_model


def test_a_paired_change_is_what_a_hand_finds():
    """Two windows: changes of 0.1 and 0.3 nats, so 0.2 +- 12.706 * 0.1 (Student t, 1 degree)."""
    base = math.log(10)
    row = {"nll": [10 * (base + 0.1), 10 * (base + 0.3)], "tokens": [10, 10]}
    # A third window that the row was not scored on.
    dense = {"nll": [10 * base, 10 * base, 10 * (base + 5)], "tokens": [10, 10, 10]}
    found = mechanisms.paired_change(row, dense)
    assert found["ppl"] == pytest.approx(10 * math.exp(0.2))
    assert found["dense_ppl"] == pytest.approx(10)
    assert found["ppl_increase"] == pytest.approx(10 * (math.exp(0.2) - 1))
    ends = [10 * (math.exp(0.2 + sign * 1.270620473617) - 1) for sign in (-1, 1)]
    assert found["interval"] == pytest.approx(ends)


def test_settings_are_taken_apart_into_what_they_have():
    model = tiny_model(num_layers=6)
    rows = ablation.take_apart("all four", ablation.all_four(model))
    assert list(rows) == ["H", "K", "F", "Q", "H+K", "H+K+F", "H+K+F+Q"]
    assert rows["H+K+F+Q"].quicksilver == ablation.all_four(model)
    letters = [ablation.mechanisms(row.quicksilver) for row in rows.values()]
    assert letters == ["H", "K", "F", "Q", "HK", "HKF", "HKFQ"]
    for row in rows.values():
        qs_jax.Config(model, row.quicksilver)  # all of them can run
    mapped = dataclasses.replace(presets.balanced(model), kv_skip=KVSkipConfig("extrapolate"))
    assert list(ablation.take_apart("mine", mapped)) == ["H", "H+K"]  # maps alone do nothing
