"""The masked engine against the NumPy oracle: the same decisions, the same logits."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qs_jax.config import FusionConfig, KVSkipConfig
from qs_jax.engine import score
from tests.oracle.comparison import check
from tests.oracle.settings import BOTH, MASKS, NEAR, ONCE, ONE, OTHERS, acted, halting, settings_of
from tests.oracle.strategies import any_case, retuned


def check_option(kind, protocol, quicksilver, **options):
    out = check(kind, quicksilver, protocol, seed=3, **options)
    assert out is not None, "a knife's edge: take another seed"
    assert acted(out, quicksilver)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (i % 2)) for i, n in enumerate(ONCE)]
)
def test_every_option_does_what_the_oracle_does(name):
    check_option(*ONCE[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_in_the_other_family_and_protocol_too(name):
    check_option(*OTHERS[name])


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [
        ("llama", "teacher-forced"),
        ("gpt2", "continuation"),
        pytest.param("gpt2", "teacher-forced", marks=pytest.mark.slow),
        pytest.param("llama", "continuation", marks=pytest.mark.slow),
    ],
)
def test_overrides_of_single_tokens(kind, protocol):
    quicksilver = settings_of(
        halting=halting(), kv_skip=KVSkipConfig(), fusion=FusionConfig(**NEAR)
    )
    nobody = {name: np.zeros_like(mask) for name, mask in MASKS.items()}
    plain = check(kind, quicksilver, protocol, seed=3, overrides=nobody)
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


# One program each.
FIXED = {
    "all": ("llama", "teacher-forced", BOTH["all"]),
    "quota": ("gpt2", "continuation", ONE["quota-forced"][1]),
    "propagate": ("gpt2", "teacher-forced", BOTH["propagate"]),
    "bits": ("llama", "continuation", BOTH["bits-hidden"]),
    "light": ("llama", "continuation", ONE["light"][1]),
    "window": ("qwen3", "teacher-forced", BOTH["attended"]),
    "window-light": ("qwen3", "continuation", ONE["light"][1]),
}

RUN: set[str] = set()  # names whose program exists


@pytest.mark.parametrize("name", FIXED)
@given(data=st.data())
@settings(max_examples=15, suppress_health_check=SLOW_DATA)
def test_any_numbers_do_what_they_do_in_the_oracle(name, data):
    kind, protocol, quicksilver = FIXED[name]
    compiled = score._jit_masked._cache_size()
    case = {"kind": kind, "protocol": protocol, "quicksilver": data.draw(retuned(quicksilver))}
    holds(case | {"seed": data.draw(st.integers(0, 999)), "repeats": data.draw(st.booleans())})
    assert score._jit_masked._cache_size() == compiled or name not in RUN
    RUN.add(name)


@pytest.mark.slow
@given(any_case())
@settings(max_examples=100, suppress_health_check=SLOW_DATA)
def test_any_setting_does_what_the_oracle_does(case):
    holds(case)
