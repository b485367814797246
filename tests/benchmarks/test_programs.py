"""What a watched call ran, and that asking the compiler about it compiles nothing."""

import jax
import pytest

import qs_jax
from benchmarks.programs import watch
from qs_jax.testing import tiny_model, tiny_params
from qs_jax.timing import Stopwatch
from tests.support import random_tokens


@pytest.mark.parametrize("committed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_memory_is_of_the_programs_that_ran(committed):
    model = tiny_model()
    params = tiny_params(model)
    if committed:
        params = jax.device_put(params, jax.devices()[0])
    cfg = qs_jax.Config(model, qs_jax.presets.paper(model), max_new_tokens=3, eos_token_ids=())
    rows_NT = random_tokens(model, 2, 12)
    jax.clear_caches()  # the other case's programs have the same shapes
    with watch() as seen, Stopwatch() as first:
        qs_jax.generate(params, rows_NT, cfg)
    with Stopwatch() as second:
        memory = seen.memory()
    assert {"start", "run_until"} <= set(seen.spent)
    assert first.compile > 0
    assert second.compile == 0
    bytes_in = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert memory is not None
    assert memory["argument_bytes"] >= bytes_in
    assert memory["peak_bytes"] >= memory["argument_bytes"] + memory["temp_bytes"]
