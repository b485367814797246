"""The laws of every mechanism in the definition: causality, decode == score, independence.

All rows that a case needs go through one program. Everything is in float64: a value at the edge
between two codes may fall either side with the order of sums, and at 2 bits one code is a quarter
of the range.
"""

import functools

import jax
import numpy as np
import pytest

import qs_jax
from qs_jax.config import Config
from qs_jax.engine import score as scoring
from qs_jax.mechanisms import fusion
from qs_jax.testing import laws
from tests import goldens
from tests.engine.contract import (
    BY_DEFAULT,
    CASES,
    MATRIX,
    contract,
    model_of,
    params_of,
    params_under,
)
from tests.support import row_of

WIDTH, NEW = goldens.LENGTHS[0], 8
WINDOW = 3  # of the widest fusion in the matrix


def open_case(name):
    kind, qs, protocol = CASES[name]
    model = model_of(kind, dtype="float64")
    given = {"max_new_tokens": NEW, "eos_token_ids": ()}
    cfg = Config(model, qs, protocol=protocol, engine="masked", **given)
    return params_under(cfg), cfg


def score(params, cfg, rows, prompts):
    given = {"prompt_lengths": prompts} if cfg.effective_protocol == "continuation" else {}
    return qs_jax.score(params, rows, cfg, return_logits=True, **given)


@functools.cache
def run(name) -> laws.Runs:
    """The last two rows of `before` are those of the goldens."""
    with jax.enable_x64(True):
        return run_rows(*open_case(name))


def run_rows(params, cfg):
    return laws.run(params, cfg, goldens.tiny_rows(cfg.model), goldens.PROMPTS)


@pytest.mark.parametrize("name", contract())
def test_the_future_touches_no_earlier_prediction(name):
    laws.check_causality(run(name))


@pytest.mark.parametrize("name", contract())
def test_rows_do_not_depend_on_batch_mates(name):
    laws.check_batch_mates(run(name))


@pytest.mark.parametrize(
    "name", contract({"HKFQ-llama-teacher-forced", "quota-llama-continuation"})
)
def test_rows_do_not_depend_on_padding(name):
    """Alone, a row is padded less: another program."""
    with jax.enable_x64(True):
        laws.check_padding(run(name))


@pytest.mark.parametrize("name", contract())
def test_nothing_moved(name):
    goldens.assert_golden(name, goldens.scores_of(run(name).before, slice(-2, None)), atol=1e-5)


@pytest.mark.parametrize("name", contract(BY_DEFAULT - {"preset-off-teacher-forced"}))
def test_decisions_only_ever_stop_work(name):
    runs = run(name)
    assert runs.before.record is not None or runs.cfg.quicksilver.is_off
    laws.check_stopping(runs)


# Where states as small as these meet some threshold; the whole matrix shares its settings.
ACTING = {
    name
    for name in BY_DEFAULT
    if not name.startswith(("preset-off", "preset-paper-t", "preset-all-four-c"))
    and (name.endswith("teacher-forced") or CASES[name][1].prompts_only)
}


@pytest.mark.parametrize("name", [case for case in contract() if case.values[0] in ACTING])
def test_each_mechanism_changes_something(name):
    """No switch is a silent no-op: the records say how much, and the logits show it."""
    qs, out, model = run(name).cfg.quicksilver, run(name).moved, run(name).cfg.model
    record = out.record
    with jax.enable_x64(True):
        long = goldens.tiny_rows(model)[0]
        dense = qs_jax.score(params_of(model), [long], Config(model), return_logits=True).logits
    assert np.abs(out.logits[-1, :WIDTH] - dense[0]).max() > 1e-3
    if qs.halting is not None:
        assert (record.depth < model.num_layers)[record.subject].any()
        if qs.halting.freeze:
            assert record.layer_tokens_saved > 0
    if qs.kv_skip is not None and qs.kv_skip.policy != "extrapolate":
        assert not record.kv_written[:, record.subject].all()
    if qs.fusion is not None:
        positions = np.arange(record.depth.shape[1])
        assert (record.representative != positions)[record.subject].any()
        assert not record.kv_held[:, record.subject].all()
    if qs.amq is not None:
        adaptive = qs.amq.entropy is not None
        assert (2 if adaptive else 8) in np.unique(record.bits)
        assert {2, 4, 8} <= set(np.unique(record.bits)) or name.startswith("preset-")


def test_entropies_are_read_where_the_drift_passes_and_nowhere_else():
    """Which tokens are charged for an entropy, from the recorded drifts alone."""
    qs, record = MATRIX["H"], run("H-llama-teacher-forced").before.record
    layers = len(record.active)
    number = np.arange(1, layers + 1)[:, None, None]
    candidates = record.active & (record.drift < qs.halting.tau_drift)
    candidates &= (number >= 1) & (number <= 4) & (np.arange(WIDTH) >= qs.sink_tokens)
    np.testing.assert_array_equal(~np.isnan(record.entropy), candidates)
    halts = candidates & (record.entropy < qs.halting.tau_halt)
    np.testing.assert_array_equal(halts, (record.depth == number) & (number < layers))


# Of their mechanisms the others decode as well; after light prompts, new tokens run dense.
DECODED = BY_DEFAULT - {
    "light-gpt2-continuation",
    *(
        f"{name}-teacher-forced"
        for name in ("K-llama", "Q-llama", "int8-llama", "preset-off", "preset-paper")
    ),
}


@pytest.mark.parametrize("name", contract(DECODED))
def test_decoding_equals_scoring(name):
    """Generates, and scores in the program of the other laws."""
    with jax.enable_x64(True):
        params, cfg = open_case(name)
        rows = [row_of(cfg.model, width) for width in (9, 20, 4)]
        out = qs_jax.generate(params, rows, cfg)
        fill = len(run(name).before.logprobs) - len(rows)
        sequences = list(out.sequences) + [out.sequences[0]] * fill
        prompts = list(map(int, out.prompt_lengths))
        prompts += prompts[:1] * fill
        scores = score(params, cfg, sequences, prompts)
    for row, start in enumerate(out.prompt_lengths):
        np.testing.assert_allclose(
            scores.logprobs[row, start : start + NEW], out.logprobs[row], atol=1e-4
        )
    if out.record is not None:
        assert_same_decisions(out.record, scores.record)


def assert_same_decisions(decoded, scored):
    """Scoring runs one token more, which may absorb some of the last and look at old keys again."""
    for row, length in enumerate(decoded.lengths):
        for name in ("active", "visible_keys", "bits", "fused", "weighed", "kv_held"):
            upto = length if name in ("active", "visible_keys", "bits") else length - WINDOW
            ours = getattr(decoded, name)[:, row, :upto]
            theirs = getattr(scored, name)[:, row, :upto]
            if name == "kv_held":
                assert (ours <= theirs).all(), "one query more only ever brings keys back"
            elif name == "fused":  # a representative may itself be absorbed by the last token
                np.testing.assert_array_equal(ours == np.arange(upto), theirs == np.arange(upto))
            else:
                np.testing.assert_array_equal(ours, theirs, name)
        np.testing.assert_array_equal(decoded.depth[row, :length], scored.depth[row, :length])


def test_a_leaky_fusion_is_caught(monkeypatch):
    """The causality test can fail: with the answer averaged into the state before it, it does."""
    merge = fusion.merge

    def leaky_merge(*args):
        """What 6.3 forbids: the earlier member of a pair takes the mean as well."""
        merged, takes_BTW = merge(*args)
        takes_BT = takes_BTW[..., 0]  # the token right before
        next_BTD = jax.numpy.roll(merged.h_BTD, -1, axis=1)
        next_takes_BT = jax.numpy.roll(takes_BT, -1, axis=1).at[:, -1].set(False)
        h_BTD = jax.numpy.where(next_takes_BT[..., None], next_BTD, merged.h_BTD)
        return merged._replace(h_BTD=h_BTD), takes_BTW

    monkeypatch.setattr(fusion, "merge", leaky_merge)
    static = ("model", "count", "returns")
    program = jax.jit(lambda *a, **k: scoring.score_masked(*a, **k), static_argnames=static)
    monkeypatch.setattr(scoring, "_jit_masked", program)
    with jax.enable_x64(True):
        leaky = run_rows(*open_case("F-llama-teacher-forced"))
    with pytest.raises(AssertionError):
        laws.check_causality(leaky)
