"""The laws of every mechanism, alone and together: causality, decode == score, independence."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import qs_jax
from qs_jax.config import Config
from qs_jax.engine import decisions, scoring, tokenwise
from qs_jax.mechanisms import fusion
from qs_jax.mechanisms.plan import bind
from tests.engine.contract import MATRIX, cases, model_of, params_of, preset_settings
from tests.support import random_tokens

CASES = list(cases())
PROMPT, WIDTH, WINDOW = 16, 26, 3
# Each mechanism, all together and every preset run by default; `make test-all` adds the pairs.
PAIRS = {name for name in MATRIX if len(name) == 2}
ACTING = MATRIX | {
    name: qs
    for name, qs in preset_settings().items()
    if name in ("balanced", "paper-scaled", "aggressive-scaled")
}


def test_entropies_are_read_where_the_drift_passes_and_nowhere_else():
    """Which tokens are charged for an entropy, from the recorded drifts alone."""
    qs, model = MATRIX["H"], model_of("llama")
    cfg = Config(model, qs, engine="masked")
    record = score(params_of(model), random_tokens(model, 1, WIDTH), cfg).record
    number = np.arange(1, model.num_layers + 1)[:, None, None]
    candidates = record.active & (record.drift < qs.halting.tau_drift)
    candidates &= (number >= 1) & (number <= 4) & (np.arange(WIDTH) >= qs.sink_tokens)
    np.testing.assert_array_equal(~np.isnan(record.entropy), candidates)
    halts = candidates & (record.entropy < qs.halting.tau_halt)
    np.testing.assert_array_equal(halts, (record.depth == number) & (number < model.num_layers))


def _param(name, kind, qs, protocol, heavy=False):
    """One worker runs all tests of a case: they share its compiled programs."""
    label = f"{name}-{protocol}"
    marks = [pytest.mark.xdist_group(label)]
    shown = ("HKFQ-llama", "quota", "preset-balanced", "preset-aggressive")
    by_default = name.startswith(shown) or protocol == "teacher-forced"
    # Others cover them.
    twice = ("preset-off", "preset-paper", "preset-aggressive-scaled", "int8", "K-", "Q-")
    if name.partition("-")[0] in PAIRS or (heavy and name.startswith(twice)):
        by_default = False
    marks += [] if by_default else [pytest.mark.slow]
    return pytest.param((name, kind, qs, protocol), id=label, marks=marks)


def _open(parameters):
    _, kind, qs, protocol = parameters
    model = model_of(kind)
    cfg = Config(model, qs, protocol=protocol, max_new_tokens=8, eos_token_ids=(), engine="masked")
    return params_of(model), cfg


@pytest.fixture(params=[_param(*case) for case in CASES])
def case(request):
    return _open(request.param)


def score(params, rows, cfg, prompt=PROMPT, **kwargs):
    if cfg.effective_protocol == "continuation":
        kwargs["prompt_lengths"] = [prompt] * len(rows)
    return qs_jax.score(params, rows, cfg, return_logits=True, **kwargs)


def assert_the_future_stays_away(logits_of, tokens_BT, first, vocab):
    """Bit for bit: changing token j changes no logit before j, and changes some from j on."""
    before = logits_of(tokens_BT)
    for j in range(first, tokens_BT.shape[1], 4):
        changed_BT = tokens_BT.copy()
        changed_BT[0, j] = (changed_BT[0, j] + 1) % vocab
        after = logits_of(changed_BT)
        np.testing.assert_array_equal(after[:, first - 1 : j], before[:, first - 1 : j])
        assert (after[:, j:] != before[:, j:]).any()


def test_the_future_touches_no_earlier_prediction(case):
    params, cfg = case
    tokens_BT = random_tokens(cfg.model, batch=1, width=WIDTH)
    first = PROMPT if cfg.effective_protocol == "continuation" else 1
    assert_the_future_stays_away(
        lambda tokens: score(params, tokens, cfg).logits, tokens_BT, first, cfg.model.vocab_size
    )


@pytest.fixture(params=[_param(*case, heavy=True) for case in CASES])
def exact_case(request):
    """In float64 where tokens are quantised: a value at the edge between two codes may fall either
    side with the order of sums, and at 2 bits one code is a quarter of the range."""
    params, cfg = _open(request.param)
    doubles = cfg.quicksilver.amq is not None
    with jax.enable_x64(doubles):
        if doubles:
            model = cfg.model.replace(dtype="float64")
            params, cfg = params_of(model), cfg.replace(model=model)
        yield params, cfg


def test_decoding_equals_scoring(exact_case):
    check_decoding(*exact_case)


@pytest.fixture(
    params=[
        pytest.param(
            case,
            id=f"{case[0]}-{case[3]}",
            marks=[pytest.mark.slow] * (case[0] != "HKFQ-llama" or case[3] == "continuation"),
        )
        for case in CASES
    ]
)
def fast_case(request):
    """Bits that `auto` would leave out where int8 is slow are executed."""
    with jax.enable_x64(True):
        cfg = _open(request.param)[1]
        qs, model = cfg.quicksilver, cfg.model.replace(dtype="float64")
        if qs.amq is not None and qs.amq.execution == "auto":
            amq = dataclasses.replace(qs.amq, execution="int8")
            qs = dataclasses.replace(qs, amq=amq)
        yield params_of(model), cfg.replace(model=model, quicksilver=qs)


def test_the_decode_engine_equals_scoring(fast_case):
    check_decoding(*fast_case, engine="compact")


def check_decoding(params, cfg, engine="masked"):
    """Generates on one engine and scores on the masked one."""
    rows = [random_tokens(cfg.model, 1, width, seed=width)[0].tolist() for width in (9, 20, 4)]
    out = qs_jax.generate(params, rows, cfg.replace(engine=engine))
    kwargs = {}
    if cfg.effective_protocol == "continuation":
        kwargs["prompt_lengths"] = out.prompt_lengths
    scores = qs_jax.score(params, out.sequences, cfg, **kwargs)
    for row, start in enumerate(out.prompt_lengths):
        np.testing.assert_allclose(
            scores.logprobs[row, start : start + 8], out.logprobs[row], atol=1e-4
        )
    if out.record is not None:
        assert_same_decisions(out.record, scores.record)


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("HKFQ", "teacher-forced"), ("quota", None))
    ],
)
def test_streaming_gives_the_tokens_of_generate(name, protocol):
    model = model_of("llama")
    cfg = Config(model, MATRIX[name], protocol=protocol, max_new_tokens=6, eos_token_ids=())
    params = params_of(model)
    rows = [random_tokens(model, 1, width, seed=width)[0].tolist() for width in (9, 16, 4)]
    tokens_BM = np.stack([step.tokens for step in qs_jax.stream(params, rows, cfg)], axis=1)
    np.testing.assert_array_equal(tokens_BM, qs_jax.generate(params, rows, cfg).tokens)


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


def test_rows_do_not_depend_on_batch_mates_or_padding(exact_case):
    params, cfg = exact_case
    rows = [random_tokens(cfg.model, 1, width, seed=width)[0].tolist() for width in (22, 23)]
    kwargs = {}
    if cfg.effective_protocol == "continuation":
        kwargs["prompt_lengths"] = [PROMPT]
    alone = [qs_jax.score(params, [row], cfg, **kwargs) for row in rows]
    kwargs = {name: value * 3 for name, value in kwargs.items()}
    mates = qs_jax.score(params, [*rows, [5] * 28], cfg, **kwargs)
    for index, row in enumerate(rows):
        one, width = alone[index], len(row)
        np.testing.assert_allclose(
            mates.logprobs[index, :width], one.logprobs[0], atol=2e-5, err_msg=str(index)
        )
        if one.record is not None:
            for name in ("active", "kv_written", "kv_held", "visible_keys", "bits", "weighed"):
                together = getattr(mates.record, name)[:, index, :width]
                np.testing.assert_array_equal(together, getattr(one.record, name)[:, 0], name)


def test_decisions_only_ever_stop_work(case):
    """Halting is monotone; the fused map is idempotent and points forward; bits stay assigned."""
    params, cfg = case
    tokens_BT = random_tokens(cfg.model, batch=1, width=WIDTH)
    record = score(params, tokens_BT, cfg).record
    if record is None:
        assert cfg.quicksilver.is_off
        return
    number = np.arange(1, cfg.model.num_layers + 1)[:, None, None]
    if cfg.quicksilver.halting is not None and cfg.quicksilver.halting.freeze:
        assert not record.active[number > record.depth].any()
    assert (np.diff(record.active.astype(int), axis=0) <= 0).all(), "a stopped token runs again"
    positions = np.arange(WIDTH)
    for fused in (*record.fused, record.representative):
        np.testing.assert_array_equal(np.take_along_axis(fused, fused, -1), fused)
        assert (fused >= positions).all()
        if cfg.quicksilver.fusion is not None and cfg.quicksilver.fusion.window == 1:
            assert (np.diff(fused, axis=-1) >= 0).all(), "order is kept where runs are adjacent"
    if cfg.quicksilver.amq is not None:
        layer = cfg.quicksilver.amq.layer
        assert (record.bits[:layer] == 16).all()
        assert (record.bits[layer:] == record.bits[-1]).all()
    assert (record.kv_held <= record.kv_written).all()


def _label(name):
    preset = name not in MATRIX
    qs = ACTING[name]
    protocol = "continuation" if qs.prompts_only else "teacher-forced"
    return f"preset-{name}-{protocol}" if preset else f"{name}-llama-{protocol}"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.xdist_group(_label(n))) for n in ACTING]
)
def test_each_mechanism_changes_something(name):
    """No switch is a silent no-op: the records say how much, and the logits show it."""
    qs, model = ACTING[name], model_of("llama")
    cfg = Config(model, qs, protocol=None, engine="masked")
    params, tokens_BT = params_of(model), random_tokens(model, batch=1, width=WIDTH)
    dense = score(params, tokens_BT, Config(model)).logits
    out = score(params, tokens_BT, cfg)
    assert (out.logits != dense).any()
    record = out.record
    if qs.halting is not None:
        assert (record.depth < model.num_layers).any()
        if qs.halting.freeze:
            assert record.layer_tokens_saved > 0
    if qs.kv_skip is not None:
        assert not record.kv_written.all()
    if qs.fusion is not None:
        assert (record.representative != np.arange(WIDTH)).any()
        assert not record.kv_held.all()
    if qs.amq is not None:
        adaptive = qs.amq.entropy is not None
        assert (2 if adaptive else 8) in np.unique(record.bits)
        assert {2, 4, 8} <= set(np.unique(record.bits)) or name not in MATRIX


def leaky_merge(*args):
    """What 6.3 forbids: the earlier member of a pair takes the mean as well."""
    merged, takes_BTW = fusion.merge(*args)
    takes_BT = takes_BTW[..., 0]  # the token right before
    next_BTD = jax.numpy.roll(merged.h_BXD, -1, axis=1)
    next_takes_BT = jax.numpy.roll(takes_BT, -1, axis=1).at[:, -1].set(False)
    h_BTD = jax.numpy.where(next_takes_BT[..., None], next_BTD, merged.h_BXD)
    return merged._replace(h_BXD=h_BTD), takes_BTW


@pytest.mark.slow
def test_a_leaky_fusion_is_caught(monkeypatch):
    """The causality test can fail: with the answer averaged into the state before it, it does."""
    model, qs = model_of("llama"), MATRIX["F"]
    params, tokens_BT = params_of(model), random_tokens(model, batch=1, width=WIDTH)
    plan, numbers = bind(qs, model, "teacher-forced")

    def logits_of(tokens_BT):
        program = jax.jit(
            functools.partial(
                scoring.score_masked, model=model, plan=plan, count=WIDTH, return_logits=True
            )
        )
        zeros = np.zeros(1, np.int32)
        prompt = tokenwise.Prompt(tokens_BT, zeros + WIDTH, zeros, None)
        return np.asarray(program(params, prompt, zeros + 1, numbers)["logits"])

    assert_the_future_stays_away(logits_of, tokens_BT, 1, model.vocab_size)

    class Leaky:
        def __getattr__(self, name):
            return leaky_merge if name == "merge" else getattr(fusion, name)

    monkeypatch.setattr(decisions, "fusion", Leaky())
    with pytest.raises(AssertionError):
        assert_the_future_stays_away(logits_of, tokens_BT, 1, model.vocab_size)
