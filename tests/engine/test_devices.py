"""Rows split over devices score as they do on one."""

import jax
import numpy as np
import pytest

import qs_jax
from qs_jax.engine.devices import local_devices
from qs_jax.testing import tiny_model, tiny_params
from tests.engine.contract import MATRIX
from tests.support import random_tokens, row_of

pytestmark = pytest.mark.skipif(
    jax.local_device_count() < 4, reason="needs four devices: XLA_FLAGS of tests/conftest.py"
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=5)


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 4]
)
@pytest.mark.parametrize(
    ("name", "engine"),
    [(None, "auto"), pytest.param("HKFQ", "masked", marks=pytest.mark.slow), ("HK", "compact")],
)
def test_scores_do_not_depend_on_the_number_of_devices(model, count, name, engine):
    """Five rows of different lengths, in float64, where no code of a quantised state flips."""
    rows = [row_of(model, width) for width in (30, 9, 21, 17, 5)]
    with jax.enable_x64(True):
        model = model.replace(dtype="float64")
        params = tiny_params(model)
        cfg = qs_jax.Config(model, MATRIX[name] if name else None, engine=engine)
        alone = qs_jax.score(params, rows, cfg)
        given = jax.local_devices()[:count]
        shared = qs_jax.score(qs_jax.replicate(params, given), rows, cfg, devices=given)
    np.testing.assert_array_equal(shared.mask, alone.mask)
    np.testing.assert_allclose(shared.logprobs, alone.logprobs, atol=1e-4)
    assert shared.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
    if name:
        for part in ("active", "depth", "kv_held"):
            assert (getattr(shared.record, part) == getattr(alone.record, part)).all()


def test_every_device_computes(model, monkeypatch):
    """Five rows on four devices: two each, the last one filled up."""
    params = tiny_params(model)
    seen = []
    pmap = jax.pmap

    def noted(function, **settings):
        program = pmap(function, **settings)

        def call(params, *arrays):
            seen.append((len(settings["devices"]), arrays[0].shape))
            return program(params, *arrays)

        return call

    monkeypatch.setattr(jax, "pmap", noted)
    rows = random_tokens(model, batch=5, width=26)
    qs_jax.score(params, rows, qs_jax.Config(model), devices=jax.local_devices()[:4])
    assert seen == [(4, (4, 2, seen[0][1][2]))]


def test_devices_that_are_not_there_are_refused():
    assert local_devices("2") == tuple(jax.local_devices()[:2])
    assert local_devices("all") == tuple(jax.local_devices())
    for wanted in ("0", "99", "some"):
        with pytest.raises(qs_jax.ConfigError, match="devices must be 'all' or between 1 and"):
            local_devices(wanted)
