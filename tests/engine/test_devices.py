"""Rows split over devices score as they do on one."""

import jax
import numpy as np
import pytest

import qs_jax
from qs_jax.config import KVSkipConfig
from qs_jax.engine.devices import local_devices
from qs_jax.testing import tiny_model, tiny_params
from tests.engine.contract import HALT, MATRIX, settings
from tests.oracle.comparison import COUNTED
from tests.support import random_tokens, row_of

pytestmark = pytest.mark.skipif(
    jax.local_device_count() < 4, reason="needs four devices: XLA_FLAGS of tests/conftest.py"
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=5)


FAST = settings(halting=HALT, kv_skip=KVSkipConfig("skip"))


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 4]
)
@pytest.mark.parametrize(
    ("qs", "protocol"),
    [
        (None, None),
        pytest.param(MATRIX["HKFQ"], "teacher-forced", marks=pytest.mark.slow),
        (settings(halting=HALT), "teacher-forced"),
        (FAST, "continuation"),
    ],
    ids=["dense", "all", "masked", "prompt"],
)
def test_scores_do_not_depend_on_the_number_of_devices(model, count, qs, protocol):
    """Five rows of different lengths, in float64, where no code of a quantised state flips."""
    rows = [row_of(model, width) for width in (30, 9, 21, 17, 5)]
    given = {"prompt_lengths": (24, 6, 15, 11, 4)} if protocol == "continuation" else {}
    with jax.enable_x64(True):
        model = model.replace(dtype="float64")
        params, cfg = tiny_params(model), qs_jax.Config(model, qs, protocol=protocol)
        alone = qs_jax.score(params, rows, cfg, **given)
        devices = jax.local_devices()[:count]
        everywhere = qs_jax.replicate(params, devices)
        shared = qs_jax.score(everywhere, rows, cfg, devices=devices, **given)
    np.testing.assert_array_equal(shared.mask, alone.mask)
    np.testing.assert_allclose(shared.logprobs, alone.logprobs, atol=1e-4)
    assert shared.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
    if qs is not None:
        assert alone.record.simulated == (protocol == "teacher-forced")
        for part in COUNTED:
            np.testing.assert_array_equal(
                getattr(shared.record, part), getattr(alone.record, part), part
            )


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
    assert local_devices(1) is None
    for wanted in ("0", "99", "9" * 5000, "some"):
        with pytest.raises(qs_jax.ConfigError, match="devices must be 'all' or between 1 and"):
            local_devices(wanted)
