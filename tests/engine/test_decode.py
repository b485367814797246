"""The decode engine: tokens and decisions of the definition, from fewer layers and keys."""

import dataclasses
import functools
import gc
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.config import AMQConfig, Config, HaltingConfig, KVSkipConfig, Speculation
from qs_jax.engine import decode, fast, prompt_plan
from qs_jax.engine import step as one_step
from tests.engine.contract import FAST, HALT, LAYERS, fast_case, few, model_of, params_of, settings
from tests.engine.programs import arguments_of
from tests.oracle.comparison import assert_same_record
from tests.support import OPTIMISED, random_tokens, row_of

ROWS, NEW = (20, 9, 12), 8


def cases():
    """Every setting under each protocol it can run; fusion is for prompts."""
    for name, qs in FAST.items():
        if qs is not None:
            yield f"{name}-continuation"
            if qs.prompts_only is None and qs.fusion is None:
                yield f"{name}-teacher-forced"


CASES = list(cases())
BY_DEFAULT = (
    "dual-skip-teacher-forced",
    "dual-propagate-kv8-teacher-forced",
    "dual-extrapolate-teacher-forced",
    "quota-fusion-int8-continuation",
)


@pytest.fixture(autouse=True)
def few_capacities(monkeypatch):
    """Few choices of slots for prompts: each is a body to compile."""
    monkeypatch.setattr(prompt_plan, "STEPS", 1)


def rows_of(model):
    return [row_of(model, width) for width in ROWS]


def case_of(case, **fields):
    name, protocol = re.fullmatch("(.*?)-(teacher-forced|continuation)", case).groups()
    return fast_case(name, protocol, max_new_tokens=NEW, **fields)


@functools.cache
def by_definition(case):
    params, cfg = case_of(case, engine="masked")
    return qs_jax.generate(params, rows_of(cfg.model), cfg)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)
    assert (found.record.simulated, expected.record.simulated) == (False, True)
    assert_same_record(found.record, expected.record, expected.record.real)


@pytest.mark.parametrize("case", few(CASES, *BY_DEFAULT))
def test_tokens_and_decisions_are_the_definitions(case):
    with jax.enable_x64(True):
        params, cfg = case_of(case, engine="compact")
        expected = by_definition(case)
        assert_same(qs_jax.generate(params, rows_of(cfg.model), cfg), expected)
        assert not expected.record.active.all() or (expected.record.bits[-1] < 16).any()


@pytest.mark.parametrize("case", few(CASES, "dual-skip-teacher-forced"))
def test_rows_depend_on_neither_batch_mates_nor_padding(case):
    """Alone, a row runs in another program, whose weights lie in place."""
    with jax.enable_x64(True):
        params, cfg = case_of(case, engine="compact")
        alone = qs_jax.generate(params, rows_of(cfg.model)[1:2], cfg)
        among = by_definition(case)
    np.testing.assert_array_equal(alone.tokens[0], among.tokens[1])
    np.testing.assert_allclose(alone.logprobs[0], among.logprobs[1], atol=1e-6)


def test_the_future_touches_no_earlier_decision():
    """A token of a prompt is exchanged: what was decided about those before it stands."""
    with jax.enable_x64(True):
        params, cfg = case_of("dual-skip-teacher-forced", engine="compact")
        rows, j = rows_of(cfg.model), 11
        before = by_definition("dual-skip-teacher-forced")
        rows[0][j] = (rows[0][j] + 1) % cfg.model.vocab_size
        after = qs_jax.generate(params, rows, cfg)
    for name in ("active", "visible_keys", "kv_held"):
        ours, theirs = getattr(after.record, name), getattr(before.record, name)
        np.testing.assert_array_equal(ours[:, 0, :j], theirs[:, 0, :j], name)
    assert (after.logprobs[0] != before.logprobs[0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dual-skip-teacher-forced", "quota-fusion-int8-continuation"])
def test_streaming_gives_the_tokens_of_generate(case):
    with jax.enable_x64(True):
        params, cfg = case_of(case)
        steps = list(qs_jax.stream(params, rows_of(cfg.model), cfg))
        found = np.stack([step.tokens for step in steps], axis=1)
        np.testing.assert_array_equal(found, by_definition(case).tokens)


def test_a_sweep_of_thresholds_compiles_nothing_anew_and_leaves_no_arrays():
    model, sizes, arrays = model_of("llama"), [], []
    given = {"max_new_tokens": 3, "eos_token_ids": ()}
    for tau in (0.3, 0.6, 0.9):
        halting = dataclasses.replace(HALT, tau_drift=tau, tau_halt=4 * tau)
        cfg = Config(model, settings(halting=halting), **given)
        qs_jax.generate(params_of(model), random_tokens(model, 2, 14), cfg)
        sizes.append([each._cache_size() for each in (fast.jit_start, decode.jit_run_until)])
        gc.collect()
        arrays.append(len(jax.live_arrays()))
    assert sizes[0] == sizes[-1]
    assert arrays[1] == arrays[2]


# --- steps of several tokens --------------------------------------------------------------------

STEP = jax.jit(one_step.step, static_argnames=("model",))
WIDTH = 4


def opened(name, rows):
    """A function that runs tokens of each row from a place on, and the caches after the prompts."""
    fuses = FAST[name] is not None and FAST[name].fusion is not None
    params, cfg = fast_case(name, "continuation" if fuses else None, max_new_tokens=16)
    prompts = rows_of(cfg.model)[:rows]
    call = lambda: qs_jax.generate(params, prompts, cfg)  # noqa: E731
    _, arrays, static = arguments_of(call, "decode", "jit_run_until")
    rest, layers, state, _, mech, _ = arrays

    def step(tokens_BT, pos_B, live_B, caches):
        tokens_BT, pos_B = jnp.asarray(tokens_BT, jnp.int32), jnp.asarray(pos_B, jnp.int32)
        held_B = jnp.where(jnp.asarray(live_B), tokens_BT.shape[1], 0)
        where = (tokens_BT, pos_B, held_B, caches)
        return STEP(rest, layers, *where, model=static["model"], mech=mech)

    return step, state.caches, np.asarray(state.text.pos_B)


def assert_same_caches(found, expected):
    """Fills, and keys and values in the slots that are taken."""
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.fill_lB, theirs.fill_lB)
        for layer in range(ours.layers):
            taken_BC = np.asarray(theirs.held(layer))
            for one, other in zip(ours.layer(layer), theirs.layer(layer), strict=True):
                one, other = np.asarray(one)[taken_BC], np.asarray(other)[taken_BC]
                np.testing.assert_allclose(one, other, atol=1e-6)


SHOWN = [("dense", 3), ("dual-skip", 3), ("dual-propagate-kv8", 3), ("dual-skip", 1)]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (case not in SHOWN))
        for case in itertools.product(FAST, (3, 1))
    ],
)
def test_a_step_of_several_tokens_is_as_many_steps(name, rows):
    with jax.enable_x64(True):
        step, caches, pos_B = opened(name, rows)
        tokens_BT = np.random.default_rng(1).integers(3, 97, (rows, WIDTH))
        live_B = np.ones(rows, bool)
        together = step(tokens_BT, pos_B, live_B, caches)
        for t in range(WIDTH):
            alone = step(tokens_BT[:, t : t + 1], pos_B + t, live_B, caches)
            caches = alone.caches
            np.testing.assert_allclose(alone.h_BTD[:, 0], together.h_BTD[:, t], atol=1e-6)
            for part in ("depth_BT", "bits_BT"):
                ours, theirs = getattr(together.state, part), getattr(alone.state, part)
                np.testing.assert_array_equal(ours[:, t], theirs[:, 0], part)
        assert_same_caches(together.caches, caches)


@pytest.mark.parametrize("name", few(FAST, "dense", "dual-skip", "dual-propagate-kv8"))
def test_a_draft_taken_back_leaves_no_trace(name):
    """Rows accept some of a draft of four tokens; the rest was wrong."""
    accepted_B, rows = np.array([2, 0, 4]), 3
    with jax.enable_x64(True):
        step, before, pos_B = opened(name, rows)
        tokens_BT = np.random.default_rng(2).integers(3, 97, (rows, WIDTH))
        draft = step(tokens_BT, pos_B, np.ones(rows, bool), before)
        caches = one_step.take_back(draft.caches, draft.keeps, jnp.asarray(accepted_B))
        expected = before
        for t in range(WIDTH):
            expected = step(tokens_BT[:, t : t + 1], pos_B + t, t < accepted_B, expected).caches
        assert_same_caches(caches, expected)
        for t in range(2):
            right_B1 = np.full((rows, 1), 40 + t)
            where = (right_B1, pos_B + accepted_B + t, np.ones(rows, bool))
            found, other = step(*where, caches), step(*where, expected)
            np.testing.assert_allclose(found.h_BTD, other.h_BTD, atol=1e-6)
            caches, expected = found.caches, other.caches
        assert_same_caches(caches, expected)


# --- layers that are not run, and caches --------------------------------------------------------

HALF = HaltingConfig(drift="relative", tau_drift=1e9, entropy=None, layers=(3,))


def leaving(halting=HALF):
    """Every token leaves after layer 3 of 6."""
    qs = settings(halting=halting, kv_skip=KVSkipConfig("skip"), protect_special=False)
    return dataclasses.replace(qs, sink_tokens=0, recent_tokens=0)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_that_halts_runs_no_deeper_layer(monkeypatch, rows):
    """The deeper layers' weights are not a number: whoever runs one cannot hide it."""
    model, program = model_of("llama"), decode.jit_run_until
    prompts = rows_of(model)[:rows]
    cfg = Config(model, leaving(), max_new_tokens=6)
    expected = qs_jax.generate(params_of(model), prompts, cfg)

    def poisoned(rest, layers, *arrays, **static):
        layers = jax.tree.map(lambda leaf: leaf.at[3:].set(jnp.nan), layers)
        return program(rest, layers, *arrays, **static)

    monkeypatch.setattr(decode, "jit_run_until", poisoned)
    found = qs_jax.generate(params_of(model), prompts, cfg)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def bytes_and_skipped_share(qs, rows, **changes):
    """Bytes of the dense model's caches and of ours, and the share of keys that ours skips."""
    model = model_of("llama", max_positions=512, **changes)
    cfg = Config(model, qs, max_new_tokens=16, eos_token_ids=())
    dense = qs_jax.generate(params_of(model), rows, cfg.replace(quicksilver=None))
    out = qs_jax.generate(params_of(model), rows, cfg)
    skipped = 1 - out.record.kv_held.sum() / (LAYERS * out.record.lengths.sum())
    return dense.kv_bytes, out.kv_bytes, skipped


def test_bytes_fall_as_keys_are_skipped():
    """Every token leaves at half depth: half of the bytes go."""
    model = model_of("llama")
    dense, ours, skipped = bytes_and_skipped_share(leaving(), random_tokens(model, 1, 96))
    token = 2 * model.num_kv_heads * model.head_dim * 4
    assert 0 <= dense / (LAYERS * (96 + 15) * token) - 1 < 0.07
    assert skipped > 0.49
    assert 1 - ours / dense > 0.9 * skipped


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0.25, 0.5, 0.75])
def test_bytes_fall_as_a_quota_stops_a_prompt(stop):
    """A round prompt, a round share of it and the last token, which always runs."""
    quota = HaltingConfig(rule="quota", layers=(2,), quota=(stop,), score="random", entropy=None)
    qs = dataclasses.replace(leaving(quota), recent_tokens=1)
    rows = random_tokens(model_of("llama"), 2, 256)
    dense, ours, skipped = bytes_and_skipped_share(qs, rows)
    assert skipped > 0.6 * stop
    assert 1 - ours / dense >= 0.9 * skipped


@pytest.mark.slow
def test_bytes_fall_as_keys_are_coded():
    """From layer 3 of 6 on: of eight numbers of eight bytes, eight bytes are left and a step."""
    amq = AMQConfig.uniform(4, 2, targets=("kv",), group=4, execution="int8")
    with jax.enable_x64(True):
        rows = random_tokens(model_of("llama"), 1, 96)
        dense, ours, _ = bytes_and_skipped_share(settings(amq=amq), rows, dtype="float64")
    assert 1 - ours / dense == pytest.approx(4 / 6 * (1 - 16 / 64), abs=0.01)


def test_caches_that_are_full_grow_and_lose_nothing():
    """Prompts leave at half depth by force, new tokens never do: the estimate must give way."""
    halting = HaltingConfig(tau_drift=float("-inf"), entropy=None, layers=(3,))
    given = {"max_new_tokens": 24, "eos_token_ids": ()}
    with jax.enable_x64(True):
        cfg = Config(model_of("llama", dtype="float64"), leaving(halting), **given)
        params, rows = params_of(cfg.model), random_tokens(cfg.model, 2, 40)
        forced = qs_jax.TokenOverrides(forced_halt=np.full(rows.shape, 3))
        with pytest.MonkeyPatch.context() as patch:
            calls, program = [], decode.jit_run_until
            patch.setattr(
                decode, "jit_run_until", lambda *a, **k: calls.append(1) or program(*a, **k)
            )
            out = qs_jax.generate(params, rows, cfg, overrides=forced)
        masked = qs_jax.generate(params, rows, cfg.replace(engine="masked"), overrides=forced)
        assert len(calls) == 2, "one cache is too small, the next one is not"
        assert_same(out, masked)
        held = out.record.kv_held[3:]
        assert not held[:, :, :39].any()
        assert held[:, :, 40:].all()


COPYING = [("dense", None), ("dual-skip", None), ("dense", Speculation(length=3))]


@pytest.mark.parametrize(("name", "speculate"), COPYING, ids=["dense", "dual-skip", "drafts"])
def test_no_step_copies_a_cache(name, speculate):
    """Read off the compiled program: no copy as large as a segment's keys outside the entry."""
    model = model_of("llama")
    cfg = Config(model, FAST[name], max_new_tokens=64, eos_token_ids=(), speculate=speculate)
    call = lambda: qs_jax.generate(params_of(model), [[1, 2, 3] * 10], cfg)  # noqa: E731
    program, arrays, static = arguments_of(call, "decode", "jit_run_until")
    text = program.lower(*arrays, **static).compile(compiler_options=OPTIMISED).as_text()
    shape = rf"f32\[(?:\d+,)?\d\d,{model.kv_size}\]"
    assert re.search(rf"{shape}\S* dynamic-update-slice\(", text), "the caches are in the program"
    loop = text[: text.index("\nENTRY")]
    copies = re.findall(rf"= {shape}\S* copy(?:-start)?\(", loop)
    assert copies == [], f"{len(copies)} copies of a cache in the loop"
