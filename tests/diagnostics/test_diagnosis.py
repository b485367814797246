"""Drift index and attribution: by hand, against finite differences, and against `score`."""

import jax
import numpy as np
import pytest

import qs_jax
from qs_jax import Config, InputError, TokenOverrides, diagnostics
from qs_jax.config import HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.testing import tiny_model, tiny_params
from tests.diagnostics import negation
from tests.engine.contract import BITS, FUSE, HALT, settings
from tests.support import random_tokens

pytestmark = pytest.mark.xdist_group("diagnosis")


@pytest.fixture(scope="module")
def negated():
    cfg = Config(negation.MODEL, negation.PRESET, engine="masked")
    return diagnostics.diagnose(negation.params(), negation.TEXT, cfg), cfg


def test_the_index_and_the_attribution_rank_it_first(negated):
    found = negated[0]
    assert found.token_drift[0].argmax() == negation.AT
    assert found.attribution[0].argmax() == negation.AT
    flags = diagnostics.flag(found, percentile=85.0)
    assert flags.by_drift[0, negation.AT]
    assert flags.by_attribution[0, negation.AT]
    assert found.touched[0].nonzero()[0].tolist() == [negation.AT]


def test_the_index_is_the_distance_worked_out_by_hand(negated):
    found = negated[0]
    dense, halted = (negation.last_states(halted) for halted in (False, True))
    expected = np.linalg.norm(dense - halted, axis=-1)
    np.testing.assert_allclose(found.drift_index[1, 0], expected, rtol=1e-5)
    np.testing.assert_array_equal(found.drift_index[0], 0)
    expected /= np.linalg.norm(dense, axis=-1)
    np.testing.assert_allclose(found.relative_index[1, 0], expected, rtol=1e-5)


def test_protecting_it_restores_the_model(negated):
    found, cfg = negated
    suspects = diagnostics.suggest_protect(found, diagnostics.flag(found), cfg)
    assert [suspect.token for suspect in suspects] == [negation.NOT]
    assert suspects[0].drift == found.token_drift[0, negation.AT]
    safe = diagnostics.protected(cfg, suspects, {"why": "test"})
    assert safe.quicksilver.provenance["protected"] == {"why": "test"}
    again = diagnostics.diagnose(negation.params(), negation.TEXT, safe)
    before, after = found.summary(), again.summary()
    assert before["perplexity"] > 2 * before["dense_perplexity"]
    assert before["kl"] > 0.1
    assert after["perplexity"] == pytest.approx(before["dense_perplexity"], rel=1e-6)
    assert after["kl"] == pytest.approx(0, abs=1e-6)
    assert (before["layer_tokens_saved"], after["layer_tokens_saved"]) == (pytest.approx(1 / 14), 0)
    assert not diagnostics.suggest_protect(found, diagnostics.flag(found), safe)


SMALL = {"hidden_size": 8, "head_dim": 4, "num_heads": 2, "mlp_size": 8, "num_layers": 4}
STOPS = HaltingConfig(tau_drift=0.0, entropy=None)
QUOTA = HaltingConfig(rule="quota", layers=(1, 2), quota=(0.4, 0.8), entropy=None)
DIFFERENTIABLE = {
    "skip": ("llama", STOPS, KVSkipConfig("skip"), "teacher-forced"),
    "propagate": ("gpt2", STOPS, KVSkipConfig("propagate"), "teacher-forced"),
    "attended": ("llama", QUOTA, KVSkipConfig("attended", tau_kv=0.2), "continuation"),
}


@pytest.mark.parametrize(
    "case",
    ["skip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("propagate", "attended"))],
)
def test_the_gradient_equals_finite_differences_of_score(case):
    """In float64; every id occurs once: a row of the embedding table is one token's embedding."""
    kind, halting, skip, protocol = DIFFERENTIABLE[case]
    with jax.enable_x64(True):
        heads = {"num_kv_heads": 1 if kind == "llama" else 2}
        model = tiny_model(kind, dtype="float64", tie_embeddings=False, **SMALL, **heads)
        params = tiny_params(model)
        tokens, width = np.array([[5, 9, 2, 7, 30, 11, 4, 8]]), 8
        qs = QuickSilverConfig(halting=halting, kv_skip=skip, sink_tokens=1, recent_tokens=1)
        cfg = Config(model, qs, protocol=protocol, continuation_tokens=3, engine="masked")
        overrides = None
        if halting is STOPS:
            forced = np.zeros((1, width), int)
            forced[0, 2:5] = [1, 2, 1]
            overrides = TokenOverrides(forced_halt=forced)
        found = diagnostics.diagnose(params, tokens, cfg, overrides=overrides)

        def difference(table):
            changed = params | {"embed": params["embed"] | {"tokens": table}}
            ours = qs_jax.score(changed, tokens, cfg, overrides=overrides)
            return ours.nll - qs_jax.score(changed, tokens, cfg.replace(quicksilver=None)).nll

        table, step = params["embed"]["tokens"], 1e-5
        for at in (3, 6):
            gradient = [
                (
                    difference(table.at[tokens[0, at], channel].add(step))
                    - difference(table.at[tokens[0, at], channel].add(-step))
                )
                / (2 * step)
                for channel in range(8)
            ]
            assert np.linalg.norm(gradient) > 1e-4
            expected = pytest.approx(np.linalg.norm(gradient), rel=1e-4)
            assert found.attribution[0, at] == expected
        assert found.record.depth.min() < 4


@pytest.mark.slow
def test_what_the_mechanisms_do_is_what_score_says():
    """With merging and rounding, through which gradients pass straight."""
    model = tiny_model(num_layers=6)
    params, rows = tiny_params(model, scale=30.0), random_tokens(model, width=24)
    qs = settings(halting=HALT, kv_skip=KVSkipConfig("skip"), fusion=FUSE, amq=BITS)
    cfg = Config(model, qs, engine="masked")
    tokens = [rows[0].tolist(), rows[1, :15].tolist()]
    found = diagnostics.diagnose(params, tokens, cfg)
    scored = qs_jax.score(params, tokens, cfg, return_logits=True)
    dense = qs_jax.score(params, tokens, cfg.replace(quicksilver=None), return_logits=True)
    for name in ("active", "kv_written", "bits", "fused", "depth", "representative"):
        np.testing.assert_array_equal(getattr(found.record, name), getattr(scored.record, name))
    np.testing.assert_allclose(found.logprobs, scored.logprobs, atol=1e-4)
    np.testing.assert_allclose(found.dense_logprobs, dense.logprobs, atol=1e-4)
    np.testing.assert_array_equal(found.mask, scored.mask)
    p, q = (jax.nn.log_softmax(out.logits[:, :-1]) for out in (dense, scored))
    kl = np.where(found.mask[:, 1:], (np.exp(p) * (p - q)).sum(-1), 0)
    np.testing.assert_allclose(found.kl[:, 1:], kl, atol=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1))[found.mask[:, 1:]].mean()
    assert found.summary()["top1_agreement"] == pytest.approx(agreement)
    assert found.summary()["perplexity"] == pytest.approx(scored.perplexity, rel=1e-4)
    record = found.record
    assert (record.representative != np.arange(24)).any()
    assert {2, 4} & set(record.bits[:, record.real].ravel().tolist())
    assert (found.attribution[record.real] > 0).any()
    assert not found.attribution[~record.real].any()
    assert not found.drift_index[:, ~record.real].any()


def test_what_cannot_be_diagnosed(negated):
    model = tiny_model()
    late, plain = HaltingConfig(entropy="final_prev"), HaltingConfig(entropy=None)
    for tokens, halting, message in (
        ([[1, 2, 3]], None, "nothing to diagnose"),
        ([[1, 2, 3]], late, "final_prev"),
        ([[1], [2, 3]], plain, "at least two"),
    ):
        cfg = Config(model, QuickSilverConfig(halting=halting))
        with pytest.raises(InputError, match=message):
            diagnostics.diagnose(tiny_params(model), tokens, cfg)
    with pytest.raises(InputError, match="between 0 and 100"):
        diagnostics.flag(negated[0], percentile=101.0)
    assert not diagnostics.flag(negated[0], percentile=100.0).either.any()
