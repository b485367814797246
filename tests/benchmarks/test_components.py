"""Attribution of time to scopes."""

import types

import pytest

import qs_jax
from benchmarks import components
from benchmarks.components import Interval
from qs_jax.testing import tiny_model, tiny_params
from tests.support import random_tokens


def test_time_is_split_among_what_runs_and_the_rest_is_idle():
    intervals = [
        Interval(0, 4, "attn"),
        Interval(2, 6, "mlp"),  # two at a time from 2 to 4
        Interval(8, 9, "mlp"),
        Interval(9, 9, "head"),
    ]
    found = components.attribute(intervals, total=10)
    assert found == {"attn": 3, "mlp": 4, "idle": 3}


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("jit(f)/while/body/Block/attn/Block.qkv/dot_general", "attn"),
        ("jit(f)/while/body/Block/attn/kv_write/dynamic_update_slice", "kv_write"),
        ("jit(f)/while/body/Block/mlp/Block.mlp/down/dot_general", "mlp"),
        ("jit(f)/while/body/halt/cond/signals/head/dot_general", "signals"),
        ("jit(f)/Block/attn_norm/mul", "other"),
        ("", "other"),
    ],
)
def test_the_scope_of_an_operation(path, component):
    assert components.scope_of(path) == component


def test_loops_are_no_operations_of_their_own():
    text = """
  %while.3 = (f32[2]{0}, s32[]) while(%tuple.1), metadata={op_name="jit(f)/mlp/while"}
  ROOT %dot.40 = f32[224,256]{1,0} dot(%a, %b), metadata={op_name="jit(f)/mlp/dot_general"}
  %copy.2 = f32[2]{0} copy(%x)
"""
    assert components.components_of(text) == {"while.3": None, "dot.40": "mlp", "copy.2": "other"}


PROGRAM = """HloModule jit_f
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %make.1 = f32[4]{0} fusion(%p), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/attn/exp"}
  %bitcast.2 = f32[2,2]{1,0} bitcast(%make.1)
  %product = f32[2,2]{1,0} dot(%bitcast.2, %w), metadata={op_name="jit(f)/mlp/dot_general"}
}
"""


def test_readers_are_found_through_other_names():
    assert components.readers_of(PROGRAM)["make.1"] == {"product"}


@pytest.mark.parametrize(
    ("end_of_make", "expected"),
    [
        (45, {"attn": 12, "mlp": 20}),  # ended late, by the thread that ran the product meanwhile
        (11, {"attn": 11, "mlp": 20}),
        (5, {"attn": 8, "mlp": 20}),  # its own event knows better
    ],
)
def test_an_operation_is_over_when_a_reader_begins(end_of_make, expected):
    events = [
        _event("make.1", 0, 8, _p=1),
        _event("product", 12, 20),
        _event("make.1", 100, 0, _p=2),  # another round, not followed by a product
        types.SimpleNamespace(
            name="end: make.1", start_ns=end_of_make, duration_ns=0, stats={"_c": 1}
        ),
    ]
    planes = [types.SimpleNamespace(lines=[types.SimpleNamespace(events=events)])]
    program = components._Program(components.components_of(PROGRAM), components.readers_of(PROGRAM))
    intervals = components._intervals(planes, {"jit_f": program})
    found = components.attribute(intervals, total=200)
    assert {name: found[name] for name in expected} == expected


def _event(name: str, start: float, duration: float, **stats):
    stats |= {"hlo_module": "jit_f", "hlo_op": name}
    return types.SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats)


def test_a_profile_finds_the_parts_of_a_layer():
    model = tiny_model(hidden_size=64, mlp_size=256)
    params, rows = tiny_params(model), random_tokens(model, width=100)
    cfg = qs_jax.Config(model, max_new_tokens=1, eos_token_ids=())
    found = components.profile(lambda: qs_jax.generate(params, rows, cfg))
    assert set(found) <= set(components.COMPONENTS)
    assert all(seconds >= 0 for seconds in found.values())
    for part in ("attn", "mlp", "head"):
        assert found[part] > 0
