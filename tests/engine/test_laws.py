"""The laws of every mechanism in the definition: causality, decode == score, independence.

All rows that a case needs go through one program. Everything is in float64: a value at the edge
between two codes may fall either side with the order of sums, and at 2 bits one code is a quarter
of the range.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import qs_jax
from qs_jax.config import Config
from qs_jax.engine import score as scoring
from qs_jax.mechanisms import fusion
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

WIDTH, SHORT = goldens.LENGTHS
PROMPT, NEW = goldens.PROMPTS[0], 8
WINDOW = 3  # of the widest fusion in the matrix
# Where a token is exchanged: anywhere, or in the continuation.
CHANGED = {"teacher-forced": range(1, WIDTH, 4), "continuation": range(PROMPT, WIDTH, 4)}


class Runs(NamedTuple):
    """One case: calls of one program, and the same rows elsewhere.

    Attributes:
      before: Rows of `same`, then the two rows of the goldens.
      after: The same with one token changed in each row of `same`, at `CHANGED`.
      moved: The rows of the goldens in another order, among rows of other lengths.
    """

    params: Any
    cfg: Config
    before: qs_jax.ScoreOutput
    after: qs_jax.ScoreOutput
    moved: qs_jax.ScoreOutput


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
def run(name) -> Runs:
    with jax.enable_x64(True):
        params, cfg = open_case(name)
        return run_rows(params, cfg)


def run_rows(params, cfg):
    long, short = goldens.tiny_rows(cfg.model)
    changed = []
    for j in CHANGED[cfg.effective_protocol]:
        changed.append(list(long))
        changed[-1][j] = (long[j] + 1) % cfg.model.vocab_size
    prompts = [PROMPT] * len(changed) + list(goldens.PROMPTS)
    before = score(params, cfg, [long] * len(changed) + [long, short], prompts)
    after = score(params, cfg, [*changed, long, short], prompts)
    others = [row_of(cfg.model, WIDTH + 2 - index) for index in range(len(changed))]
    moved = score(params, cfg, [short, *others, long], [prompts[-1], *prompts[:-1]])
    return Runs(params, cfg, before, after, moved)


def assert_the_future_stays_away(runs):
    """Bit for bit: changing token j changes no logit before j, and changes some from j on."""
    first = PROMPT if runs.cfg.effective_protocol == "continuation" else 1
    for row, j in enumerate(CHANGED[runs.cfg.effective_protocol]):
        before, after = runs.before.logits[row], runs.after.logits[row]
        np.testing.assert_array_equal(after[first - 1 : j], before[first - 1 : j])
        assert (after[j:WIDTH] != before[j:WIDTH]).any()


@pytest.mark.parametrize("name", contract())
def test_the_future_touches_no_earlier_prediction(name):
    assert_the_future_stays_away(run(name))


@pytest.mark.parametrize("name", contract())
def test_rows_do_not_depend_on_batch_mates(name):
    """Bit for bit where only the mates change; to rounding at another place in the batch."""
    runs = run(name)
    kept = slice(-2, None)
    here = goldens.scores_of(runs.before, kept)
    for part, array in goldens.scores_of(runs.after, kept).items():
        np.testing.assert_array_equal(array, here[part], part)
    for row, place in ((-1, 0), (-2, -1)):
        width = runs.before.record.lengths[row] if runs.before.record else SHORT
        assert_same_row(runs.before, row, runs.moved, place, width)


def assert_same_row(one, row, other, place, width):
    np.testing.assert_allclose(one.logprobs[row, :width], other.logprobs[place, :width], atol=2e-5)
    if one.record is None:
        return
    for name in ("active", "kv_written", "kv_held", "visible_keys", "bits", "weighed"):
        mine, theirs = getattr(one.record, name), getattr(other.record, name)
        np.testing.assert_array_equal(mine[:, row, :width], theirs[:, place, :width], name)


@pytest.mark.parametrize(
    "name", contract({"HKFQ-llama-teacher-forced", "quota-llama-continuation"})
)
def test_rows_do_not_depend_on_padding(name):
    """Alone, a row is padded less: another program."""
    runs = run(name)
    with jax.enable_x64(True):
        rows = goldens.tiny_rows(runs.cfg.model)
        alone = score(runs.params, runs.cfg, rows[1:], goldens.PROMPTS[1:])
    assert_same_row(runs.before, -1, alone, 0, SHORT)


@pytest.mark.parametrize("name", contract())
def test_nothing_moved(name):
    goldens.assert_golden(name, goldens.scores_of(run(name).before, slice(-2, None)), atol=1e-5)


@pytest.mark.parametrize("name", contract(BY_DEFAULT - {"preset-off-teacher-forced"}))
def test_decisions_only_ever_stop_work(name):
    """Halting is monotone; the fused map is idempotent and points forward; bits stay assigned."""
    qs, record = run(name).cfg.quicksilver, run(name).before.record
    if record is None:
        assert qs.is_off
        return
    layers, _, width = record.active.shape
    number = np.arange(1, layers + 1)[:, None, None]
    if qs.halting is not None and qs.halting.freeze:
        assert not record.active[number > record.depth].any()
    assert (np.diff(record.active.astype(int), axis=0) <= 0).all(), "a stopped token runs again"
    for fused in (*record.fused, record.representative):
        np.testing.assert_array_equal(np.take_along_axis(fused, fused, -1), fused)
        assert (fused >= np.arange(width)).all()
        if qs.fusion is not None and qs.fusion.window == 1:
            assert (np.diff(fused, axis=-1) >= 0).all(), "order is kept where runs are adjacent"
    if qs.amq is not None:
        assert (record.bits[: qs.amq.layer] == 16).all()
        assert (record.bits[qs.amq.layer :] == record.bits[-1]).all()
    assert (record.kv_held <= record.kv_written).all()


# Where states as small as these meet some threshold; the whole matrix shares its settings.
ACTING = {
    name
    for name in BY_DEFAULT
    if not name.startswith(("preset-off", "preset-paper-t", "preset-aggressive-c"))
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
        assert_the_future_stays_away(leaky)
