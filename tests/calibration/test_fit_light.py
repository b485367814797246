"""Light layers as they are fitted, against NumPy's least squares and derivatives of attention."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax import ConfigError, InputError
from qs_jax.calibration import choose, fit_light, sensitivity
from qs_jax.calibration.fit_light import Stream
from tests.oracle.comparison import a_model
from tests.oracle.model import OracleModel, softmax
from tests.support import random_tokens

WIDTH, SKIP = 48, 4
FREE = -1.0  # a price at which everything is kept


def windows(model, count=16):
    return random_tokens(model, count, WIDTH)


class Reference:
    """The dense model's states and a light stream's, in NumPy float64."""

    def __init__(self, params, model, tokens_WT):
        self.net = OracleModel(params, model)
        embed = self.net.embed
        self.dense = [np.stack([embed(int(t), i) for i, t in enumerate(row)]) for row in tokens_WT]
        self.own = self.dense

    def run(self, layer, light=None):
        """One layer on both streams; features and targets of the light one, `[W, T, ...]`."""
        net, before = self.net, self.own
        heads = None if light is None else light.heads_N.tolist()
        self.dense = [self.whole(layer, net.attended(layer, row)[0]) for row in self.dense]
        a = np.stack([net.attended(layer, row, heads)[0] for row in before])
        if light is None:
            self.own = self.dense
            return None
        kept = np.stack([net.neurons(layer, row) for row in a])[..., light.neurons_M]
        read = np.concatenate([normalised(a), kept, np.ones((*a.shape[:2], 1))], axis=-1)
        own = a + read @ np.asarray(light.encode_FR) @ np.asarray(light.decode_RD)
        own[:, :SKIP] = np.stack(self.dense)[:, :SKIP]
        self.own = own
        return read, np.stack(self.dense) - a

    def whole(self, layer, a):
        return a + self.net.linear("down", layer, self.net.neurons(layer, a))


def normalised(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True))


def ridge(x, y, weight, penalties):
    """Weighted ridge least squares as an ordinary one with more rows."""
    root = np.sqrt(weight)[:, None]
    extra = np.diag(np.sqrt(weight.sum() * penalties))
    rows = (
        np.concatenate([x * root, extra]),
        np.concatenate([y * root, 0 * extra @ np.ones((len(extra), y.shape[1]))]),
    )
    return np.linalg.lstsq(*rows, rcond=None)[0]


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_layers_are_fitted_on_the_states_that_light_layers_made(kind):
    """The first drops heads and neurons; the second keeps all, so its map is plain ridge."""
    model, params = a_model(kind, "float32")
    tokens_WT = windows(model)
    stream = Stream(params, tokens_WT, model, 2, 0.05, skip_first=SKIP, batch_size=5)
    first = stream.step()
    stream.price = FREE
    second = stream.step()
    assert (len(first.heads_N), len(first.neurons_M)) < (model.num_heads, model.mlp_size)
    assert second.sizes == (model.num_heads, model.mlp_size, model.hidden_size)
    reference = Reference(params, model, tokens_WT)
    reference.run(1)
    reference.run(2, first)
    read, missing = (x[:, SKIP:].reshape(-1, x.shape[-1]) for x in reference.run(3, second))
    weight = stream.weight_WT[:, SKIP:].reshape(-1).astype(np.float64)
    penalties = 1e-3 * (read**2 * weight[:, None]).sum(0) / weight.sum()
    penalties[: model.hidden_size], penalties[-1] = 1e-3, 0
    expected = ridge(read, missing, weight, penalties + 1e-9)
    found = np.asarray(second.encode_FR) @ np.asarray(second.decode_RD)
    np.testing.assert_allclose(read @ found, read @ expected, atol=2e-3 * missing.std())
