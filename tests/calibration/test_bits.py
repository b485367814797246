"""The grid of entropy thresholds against single calls and the shares of bits they recorded."""

import dataclasses

import numpy as np
import pytest

import qs_jax
from qs_jax.calibration import amq_grid
from qs_jax.config import AMQConfig, QuickSilverConfig
from qs_jax.testing import tiny_model, tiny_params
from tests.support import random_tokens

BETA = {2: 0.25, 4: 0.5, 8: 1.0, 16: 1.0}  # cost of such a token relative to 8 bits (paper E.9)


def test_every_point_is_what_a_call_of_its_own_says():
    model = tiny_model(num_layers=4)
    params, tokens = tiny_params(model, scale=30.0), random_tokens(model, batch=3, width=30)
    cfg = qs_jax.Config(model)
    amq = AMQConfig(layer=2, normalization="log_vocab", tau_low=0.1, tau_high=0.9, group=8)
    points = amq_grid(params, tokens, cfg, lows=(0.2, 0.35), highs=(0.4, 0.5), amq=amq, weight=3.0)

    def call(setting):
        qs = QuickSilverConfig(amq=setting)
        return qs_jax.score(params, tokens, cfg.replace(quicksilver=qs, engine="masked"))

    base = call(AMQConfig.uniform(8, layer=2, group=8))
    assert len(points) == 4
    assert [p.utility for p in points] == sorted((p.utility for p in points), reverse=True)
    assert len({p.paper_flops_saved for p in points}) > 1
    for point in points:
        scored = call(dataclasses.replace(amq, tau_low=point.tau_low, tau_high=point.tau_high))
        increase = scored.perplexity - base.perplexity
        assert point.ppl_increase == pytest.approx(increase, rel=1e-4, abs=1e-3)
        beta = np.vectorize(BETA.get)(scored.record.bits)
        assert point.paper_flops_saved == pytest.approx(1 - beta.mean())
        assert point.utility == pytest.approx(3 * point.paper_flops_saved - point.ppl_increase)


def test_thresholds_that_cross_are_refused():
    model = tiny_model()
    with pytest.raises(qs_jax.ConfigError, match="below every high one"):
        amq_grid(tiny_params(model), random_tokens(model), qs_jax.Config(model), lows=(0.9,))
