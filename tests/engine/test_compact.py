"""The compact engine: the oracle's and the masked engine's decisions, on fewer tokens."""

import dataclasses
import re

import chex
import jax
import numpy as np
import pytest
from qs_jax.mechanisms.plan import bind

import qs_jax
from qs_jax.config import Config, HaltingConfig, KVSkipConfig
from qs_jax.engine import (
    batching,
    compact,
    generate,
    layer,
    schedule,
    scoring,
    token_loop,
    tokenwise,
)
from qs_jax.errors import ConfigError
from tests.engine.contract import (
    CASES,
    MATRIX,
    contract,
    model_of,
    params_of,
    settings,
)
from tests.oracle.comparison import COUNTED, MEASURED
from tests.support import OPTIMISED, random_tokens, row_of

LENGTHS, PROMPTS = (31, 17, 24), (22, 9, 15)


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """Capacities that fit rows as short as these, and few of them: each is a body to compile."""
    monkeypatch.setattr(schedule, "SMALLEST_STEP", 8)
    monkeypatch.setattr(schedule, "GRANULE", 4)
    monkeypatch.setattr(schedule, "STEPS", 2)


def rows_of(model, lengths=LENGTHS):
    return [row_of(model, width) for width in lengths]


def score(params, model, qs, protocol, rows=None, **fields):
    cfg = Config(model, qs, protocol=protocol, **fields)
    kwargs = {"prompt_lengths": PROMPTS} if cfg.effective_protocol == "continuation" else {}
    return qs_jax.score(params, rows or rows_of(model), cfg, return_logits=True, **kwargs)


def assert_same(ours, theirs, atol=1e-8):
    assert not ours.record.simulated
    for name in COUNTED:
        np.testing.assert_array_equal(
            getattr(ours.record, name), getattr(theirs.record, name), err_msg=name
        )
    for name in MEASURED:
        one, other = getattr(ours.record, name), getattr(theirs.record, name)
        both = np.isfinite(one) & np.isfinite(other)
        np.testing.assert_allclose(one[both], other[both], atol=atol, err_msg=name)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=atol)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(
            ours.logits[row, PROMPTS[row] : length],
            theirs.logits[row, PROMPTS[row] : length],
            atol=atol,
        )


@pytest.mark.parametrize(
    "name", contract({"HKFQ-llama-teacher-forced", "preset-aggressive-scaled-continuation"})
)
def test_same_decisions_and_logits_as_the_masked_engine(name):
    kind, qs, protocol = CASES[name]
    if qs.is_off:
        pytest.skip("there are no decisions")
    with jax.enable_x64(True):
        model = model_of(kind, dtype="float64")
        params = params_of(model)
        theirs = score(params, model, qs, protocol, engine="masked")
        assert theirs.record.simulated
        assert_same(score(params, model, qs, protocol, engine="compact"), theirs)


def widths_traced(monkeypatch):
    """Tokens a row in every layer body that is traced from now on."""
    jax.clear_caches()  # a quota's capacities are known either way: one program serves both
    widths, block = set(), layer._block

    def noting(call, state, *args):
        widths.add(state.h_BTD.shape[1])
        return block(call, state, *args)

    monkeypatch.setattr(layer, "_block", noting)
    return widths


STAGED = settings(
    halting=HaltingConfig(rule="quota", layers=(2, 4), quota=(0.5, 0.8), entropy=None),
    kv_skip=KVSkipConfig("skip"),
)


def test_layers_run_on_as_many_slots_as_tokens_compute(monkeypatch):
    """Whole rows up to layer 2, then what the quotas leave, rounded up by less than a granule."""
    model = model_of("llama")
    params, widths = params_of(model), widths_traced(monkeypatch)
    out = score(params, model, STAGED, None, continuation_tokens=9)
    most = out.record.active.sum(-1).max(-1)
    expected = [32, *(-(-most[layer] // 4) * 4 for layer in (2, 4))]
    assert most[4] < most[2] < most[0]
    assert widths == set(expected)
    theirs = score(params, model, STAGED, None, engine="masked")
    assert_same(out, theirs, atol=1e-4)


def test_entropies_of_the_previous_step_are_refused():
    model = model_of("llama")
    last = settings(halting=HaltingConfig(entropy="final_prev"))
    with pytest.raises(ConfigError, match="token by token"):
        score(params_of(model), model, last, None, engine="compact")


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        pytest.param(
            "HKFQ", "teacher-forced", marks=pytest.mark.xdist_group("HKFQ-llama-teacher-forced")
        ),
        pytest.param("HKFQ", "continuation", marks=pytest.mark.slow),
        pytest.param("quota", "continuation", marks=pytest.mark.slow),
    ],
)
def test_the_future_and_batch_mates_stay_away(name, protocol):
    """To 1e-5, because a later token may change the bucket and so the order of sums; in float64,
    where no code of a quantised value flips by it."""
    with jax.enable_x64(True):
        model = model_of("llama", dtype="float64")
        params, rows = params_of(model), rows_of(model)
        before = score(params, model, MATRIX[name], protocol, rows)
        for j in (5, 16, 22, 28):
            if protocol == "continuation" and j < PROMPTS[0]:
                continue
            changed = [list(row) for row in rows]
            changed[0][j] = (changed[0][j] + 1) % model.vocab_size
            after = score(params, model, MATRIX[name], protocol, changed)
            first = PROMPTS[0] - 1 if protocol == "continuation" else 0
            np.testing.assert_allclose(
                after.logits[0, first:j], before.logits[0, first:j], atol=1e-5
            )
            assert (after.logits[0, j:31] != before.logits[0, j:31]).any()
            np.testing.assert_allclose(after.logprobs[1:], before.logprobs[1:], atol=1e-5)


def test_a_sweep_and_near_lengths_share_a_program(monkeypatch):
    """Thresholds, layers of halting windows and fusion are numbers; lengths come in buckets."""
    model = model_of("llama")
    params = params_of(model)
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(scoring.score_compact, n=1)
    static = (*scoring._STATIC, "schedule")
    monkeypatch.setattr(scoring, "jit_score_compact", jax.jit(counted, static_argnames=static))
    for tau, width in ((0.2, 29), (0.5, 30), (0.9, 32)):
        qs = settings(halting=dataclasses.replace(MATRIX["H"].halting, tau_drift=tau))
        qs_jax.score(params, random_tokens(model, 2, width), Config(model, qs))


@pytest.mark.parametrize("name", ["HKFQ", "quota"])
def test_the_program_lowers_for_cuda(name):
    model = model_of("llama")
    qs = STAGED if name == "quota" else MATRIX["HKFQ"]
    cfg = Config(model, qs, protocol="continuation")
    batch = batching.make_batch(random_tokens(model, 2, 32), model)
    plan, numbers = bind(qs, model, "continuation")
    cut, segments = schedule.arrange(cfg, batch, batch.lengths_B, None, plan)
    prompt = tokenwise.Prompt(*batch, batch.lengths_B, None)
    run = jax.jit(compact.run_prompt, static_argnames=("model", "plan", "schedule", "capacity"))
    traced = run.trace(params_of(model), prompt, model, plan, numbers, cut, segments, capacity=48)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.dot_general" in text
    assert ("stablehlo.case" in text) or name == "quota"


@pytest.mark.parametrize("score", ["random", pytest.param("drift", marks=pytest.mark.slow)])
def test_no_layer_copies_the_states(score):
    """Read off the compiled program of a prompt: what reads the states comes before they change.

    How far a layer moved them is only there where the rule reads it.
    """
    model = model_of("llama")
    halting = HaltingConfig(rule="quota", layers=(2,), quota=(0.0,), score=score, entropy=None)
    qs = qs_jax.QuickSilverConfig(halting=halting, kv_skip=KVSkipConfig("skip"))
    cfg, params = Config(model, qs, engine="compact", max_new_tokens=1), params_of(model)
    rows = random_tokens(model, batch=3, width=40)
    _, padded, numbers, plan = generate._prepare(params, rows, cfg, None, None, None)
    program = token_loop.jit_start.lower(params, *padded, numbers, model=model, plan=plan)
    text = program.compile(compiler_options=OPTIMISED).as_text()
    shape = re.escape(f"f32[{','.join(map(str, (*padded.tokens_BT.shape, model.hidden_size)))}]")
    assert re.search(rf"= {shape}\S* fusion\(", text), "the states are in the program"
    copies = re.findall(rf"= {shape}\S* copy\(%?get-tuple-element.*", text)
    assert copies == [], f"{len(copies)} copies of the states"
    assert ("signals/jit(norm)" in text) == (score == "drift")
    record = qs_jax.generate(params, rows, cfg).record
    assert np.isfinite(record.drift).any() == (score == "drift")
