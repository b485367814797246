"""Attribution of time to scopes."""

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


def test_a_profile_finds_the_parts_of_a_layer():
    model = tiny_model(hidden_size=64, mlp_size=256)
    params, rows = tiny_params(model), random_tokens(model, width=100)
    cfg = qs_jax.Config(model, max_new_tokens=1, eos_token_ids=())
    found = components.profile(lambda: qs_jax.generate(params, rows, cfg))
    assert set(found) <= set(components.COMPONENTS)
    assert all(seconds >= 0 for seconds in found.values())
    for part in ("attn", "mlp", "head"):
        assert found[part] > 0
