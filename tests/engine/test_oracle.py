"""The masked engine against the NumPy oracle: the same decisions, the same logits."""

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings

from qs_jax.config import (
    PROTOCOLS,
    FusionConfig,
    KVSkipConfig,
)
from tests.oracle.comparison import check
from tests.oracle.settings import BOTH, CASES, MASKS, NEAR, acted, halting, settings_of
from tests.oracle.strategies import any_case


@pytest.mark.parametrize(("name", "kind", "protocol", "quicksilver"), CASES)
def test_every_option_does_what_the_oracle_does(name, kind, protocol, quicksilver):
    features = ("state", "embedding") if kind == "llama" else ("state",)
    out = check(kind, quicksilver, protocol, seed=3, features=features)
    assert out is not None, "a knife's edge: take another seed"
    assert acted(out, quicksilver), name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_overrides_of_single_tokens(protocol, kind):
    quicksilver = settings_of(
        halting=halting(), kv_skip=KVSkipConfig(), fusion=FusionConfig(**NEAR)
    )
    plain = check(kind, quicksilver, protocol, seed=3)
    out = check(kind, quicksilver, protocol, seed=3, overrides=MASKS)
    assert out is not None
    assert (out.depth != plain.depth).any()
    assert (out.kv_written & ~plain.kv_written).any()


@pytest.mark.parametrize(
    ("kind", "protocol", "name"),
    [
        pytest.param("gpt2", "teacher-forced", "attended", marks=pytest.mark.slow),
        pytest.param("llama", "teacher-forced", "fusion-attention", marks=pytest.mark.slow),
        ("llama", "continuation", "delay-retain"),
    ],
)
def test_float32_makes_the_same_decisions(kind, protocol, name):
    options = {"dtype": "float32", "atol": 1e-4, "knife": 1e-5}
    out = check(kind, BOTH[name], protocol, seed=3, **options)
    assert out is not None, "a knife's edge: take another seed"
    assert acted(out, BOTH[name])


def holds(case: dict[str, Any]) -> None:
    assume(
        check(case.pop("kind"), case.pop("quicksilver"), case.pop("protocol"), **case) is not None
    )


SLOW_DATA = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@given(any_case())
@settings(max_examples=15, suppress_health_check=SLOW_DATA)
def test_any_setting_does_what_the_oracle_does(case):
    holds(case)


@pytest.mark.slow
@given(any_case())
@settings(max_examples=200, suppress_health_check=SLOW_DATA)
def test_many_settings_do_what_the_oracle_does(case):
    holds(case)
