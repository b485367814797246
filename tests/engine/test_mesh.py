"""Rows and parameters over a mesh: every layout scores and generates what one device does."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import qs_jax
from qs_jax.config import Speculation
from qs_jax.engine.devices import AXES, local_devices
from qs_jax.models.quantized import in_int8
from qs_jax.testing import tiny_model, tiny_params
from tests.engine.contract import FAST, fast_case, few, model_of, params_of
from tests.engine.programs import arguments_of
from tests.oracle.comparison import COUNTED
from tests.support import random_tokens, row_of

pytestmark = pytest.mark.skipif(
    jax.local_device_count() < 4, reason="needs four devices: XLA_FLAGS of tests/conftest.py"
)

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)]
CASES = {
    "dense": "teacher-forced",
    "dual-skip": "teacher-forced",
    "dual-extrapolate": "teacher-forced",
    "dual-int8": "teacher-forced",
    "quota-extrapolate": "continuation",
    "quota-fusion-int8": "continuation",
    "light": "continuation",
    "light-gpt2": "continuation",
}
EVERY = [(name, LAYOUTS) for name in CASES]
SHOWN = [("dense", [(2, 2)]), ("quota-extrapolate", [(2, 2)])]


def same_records(ours, theirs):
    for part in COUNTED if ours is not None or theirs is not None else ():
        np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part), part)


@pytest.mark.parametrize(("name", "layouts"), few([*SHOWN, *EVERY], *SHOWN))
def test_scores_and_tokens_do_not_depend_on_the_layout(name, layouts):
    """Five rows of different lengths, in float64, where no decision flips by rounding."""
    protocol = CASES[name]
    with jax.enable_x64(True):
        params, cfg = fast_case(name, protocol, max_new_tokens=5)
        rows = [row_of(cfg.model, width) for width in (30, 9, 21, 17, 5)]
        given = {"prompt_lengths": (24, 6, 15, 11, 4)} if protocol == "continuation" else {}
        scored = qs_jax.score(params, rows, cfg, **given)
        written = qs_jax.generate(params, rows, cfg)
        for mesh in itertools.starmap(qs_jax.make_mesh, layouts):
            there = qs_jax.shard(params, mesh)
            ours = qs_jax.score(there, rows, cfg, devices=mesh, **given)
            np.testing.assert_allclose(ours.logprobs, scored.logprobs, atol=1e-4)
            same_records(ours.record, scored.record)
            ours = qs_jax.generate(params, rows, cfg, devices=mesh)
            np.testing.assert_array_equal(ours.tokens, written.tokens)
            np.testing.assert_allclose(ours.logprobs, written.logprobs, atol=1e-4)
            same_records(ours.record, written.record)


@pytest.mark.parametrize(("data", "cuts"), few([(2, 1), (1, 4), (2, 2)], (2, 1)))
def test_drafts_and_streams_do_not_depend_on_the_layout(data, cuts):
    """Three rows: the fourth, which is filled up, has no say in whether drafts are verified."""
    params, model = params_of(model_of("llama")), model_of("llama")
    drafting = Speculation(length=3, gate=1.5)
    cfg = qs_jax.Config(model, max_new_tokens=16, eos_token_ids=(), speculate=drafting)
    rows, mesh = [row_of(model, n)[:4] * 5 for n in (7, 9, 11)], qs_jax.make_mesh(data, cuts)
    alone = qs_jax.generate(params, rows, cfg)
    over = qs_jax.generate(params, rows, cfg, devices=mesh)
    assert 0 < alone.accepted.sum() < alone.drafted.sum()
    for name in ("tokens", "passes", "drafted", "accepted"):
        np.testing.assert_array_equal(getattr(over, name), getattr(alone, name), name)
    steps = list(qs_jax.stream(params, rows, cfg, devices=mesh))
    told = [[step.tokens[row] for step in steps if step.is_new[row]] for row in range(3)]
    np.testing.assert_array_equal(told, alone.tokens)
    np.testing.assert_array_equal(steps[-1].passes, alone.passes)


@pytest.mark.parametrize("engine", few(["masked", "sampled", "codes", "one-row"], "one-row"))
def test_other_ways_to_generate(engine):
    """By the definition, by chance, from 8-bit codes; and a single row, whose weights are cut."""
    model = model_of("gpt2" if engine == "sampled" else "llama")
    params, cfg = params_of(model), qs_jax.Config(model, max_new_tokens=5, eos_token_ids=())
    if engine == "masked":
        cfg = cfg.replace(quicksilver=FAST["dual-skip"], engine="masked")
    if engine == "sampled":
        cfg = cfg.replace(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2)
    params = in_int8(params) if engine == "codes" else params
    rows = random_tokens(model, 1 if engine == "one-row" else 3, 14)
    alone = qs_jax.generate(params, rows, cfg)
    for layout in ((1, 4), (2, 2)):
        over = qs_jax.generate(params, rows, cfg, devices=qs_jax.make_mesh(*layout))
        np.testing.assert_array_equal(over.tokens, alone.tokens)
        np.testing.assert_allclose(over.logprobs, alone.logprobs, atol=1e-4)


def test_every_device_does_its_share():
    """Products of a device, by XLA's count, and where the caches of the loop are."""
    model = tiny_model(hidden_size=64, num_heads=8, mlp_size=128, vocab_size=96)
    params, rows = tiny_params(model), random_tokens(model, 8, 32)
    cfg, mesh = qs_jax.Config(model, max_new_tokens=3, eos_token_ids=()), qs_jax.make_mesh(2, 2)

    def flops(**options):
        call = lambda: qs_jax.score(params, rows, cfg, **options)  # noqa: E731
        program, arrays, static = arguments_of(call, "score", "_jit_dense")
        return program.lower(*arrays, **static).compile().cost_analysis()["flops"]

    assert flops(devices=mesh) < 0.3 * flops()
    generate = lambda: qs_jax.generate(params, rows, cfg, devices=mesh)  # noqa: E731
    _, (_, layers, state, *_), _ = arguments_of(generate, "decode", "jit_run_until")
    assert layers["gate_up"]["kernel"].sharding.spec == P(None, None, "model")
    assert layers["down"]["kernel"].sharding.spec == P(None, "model", None)
    assert state.caches[0].k_CO.sharding.spec == P(None, "data", None, "model")


def test_parameters_in_place_are_left_alone():
    model, mesh = tiny_model(), qs_jax.make_mesh(model=2)
    assert mesh.shape == {"data": jax.local_device_count() // 2, "model": 2}
    once = qs_jax.shard(tiny_params(model), mesh)
    again = qs_jax.shard(once, mesh)
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (once, again))))


def test_meshes_that_cannot_be_are_refused():
    devices = jax.local_devices()[:4]
    assert local_devices("2x2") == qs_jax.make_mesh(2, 2)
    assert local_devices("1x3") == Mesh(np.array(devices[:3])[None], AXES)
    for wanted in ("2x3", "x2", "2x", "0x1", "1x1x1"):
        with pytest.raises(qs_jax.ConfigError, match="devices must be"):
            local_devices(wanted)
    with pytest.raises(qs_jax.ConfigError, match="a mesh of 4 x 2 takes 8 devices and there are 4"):
        qs_jax.make_mesh(4, 2, devices)
    with pytest.raises(qs_jax.ConfigError, match=r"make no groups of model=3: give data\."):
        qs_jax.make_mesh(model=3, devices=devices)
    with pytest.raises(qs_jax.ConfigError, match="at least 1, got 0 and 1"):
        qs_jax.make_mesh(0)
    model = tiny_model()
    for mesh in (Mesh(np.array(devices), ("rows",)), jax.make_mesh((4,), ("data",))):
        with pytest.raises(qs_jax.ConfigError, match=r"qs_jax\.make_mesh makes one"):
            qs_jax.score(tiny_params(model), [[5, 6]], qs_jax.Config(model), devices=mesh)


def test_a_mesh_of_other_axis_types_is_taken():
    """`jax.make_mesh` gives axes whose sharding is in the types."""
    model, explicit = tiny_model(), jax.make_mesh((2, 2), AXES, axis_types=(AxisType.Explicit,) * 2)
    rows, cfg = random_tokens(model, 4, 9), qs_jax.Config(model)
    alone = qs_jax.score(tiny_params(model), rows, cfg)
    over = qs_jax.score(tiny_params(model), rows, cfg, devices=explicit)
    np.testing.assert_allclose(over.logprobs, alone.logprobs, atol=1e-4)
