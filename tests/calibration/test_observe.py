"""Observed signals against the hidden states and attention weights of Hugging Face torch."""

import numpy as np
import pytest

from qs_jax.calibration.observe import PERCENTS, observe, summarize
from tests.support import make_pair, random_tokens

pytestmark = pytest.mark.xdist_group("observe")


@pytest.fixture(scope="module", params=["llama-gqa", pytest.param("gpt2", marks=pytest.mark.slow)])
def observed(request, tmp_path_factory):
    """Ours at every position but the first and the last, and what torch says there."""
    torch = pytest.importorskip("torch")

    pair = make_pair(request.param, tmp_path_factory.mktemp("observe"))
    tokens_WT = random_tokens(pair.model, batch=5, width=24)
    ours = observe(pair.params, tokens_WT, pair.model, positions=99, batch_size=2)
    pair.hf.set_attn_implementation("eager")
    with torch.inference_mode():
        out = pair.hf(
            torch.tensor(tokens_WT, dtype=torch.long),
            output_hidden_states=True,
            output_attentions=True,
        )
    # The last state that torch shows has been through the final norm: one layer less.
    states = np.stack([state.numpy() for state in out.hidden_states[:-1]]).astype(np.float64)
    weights = np.stack([weight.numpy() for weight in out.attentions]).astype(np.float64)
    return ours, states, weights


def percentiles(array_LWP):
    return np.percentile(array_LWP.reshape(len(array_LWP), -1), PERCENTS, axis=1).T


def test_drift_and_distance_are_those_of_torch(observed):
    ours, states, _ = observed
    before, after = states[:-1], states[1:]
    inner = slice(1, -1)
    drift = np.linalg.norm(after - before, axis=-1)[:, :, inner]
    np.testing.assert_allclose(ours.percentiles["drift"][:-1], percentiles(drift), rtol=1e-4)
    relative = drift / np.linalg.norm(after, axis=-1)[:, :, inner]
    table = ours.percentiles["relative_drift"]
    np.testing.assert_allclose(table[:-1], percentiles(relative), rtol=1e-4)
    apart = np.linalg.norm(after[:, :, 1:-1] - after[:, :, :-2], axis=-1)
    np.testing.assert_allclose(ours.percentiles["distance"][:-1], percentiles(apart), rtol=1e-4)


def test_attention_to_halted_tokens_is_that_of_torch(observed):
    """Tokens under both 25th percentiles at a layer or before; weight on oneself does not count."""
    ours, _, weights = observed
    off_diagonal = weights * ~np.eye(weights.shape[-1], dtype=bool)
    received = off_diagonal.max((2, 3))[:, :, 1:-1]
    assert ours.tokens == received[0].size
    assert 0 < ours.tau_kv <= received.max()
    signals = {
        name: np.zeros_like(received)
        for name in ("drift", "relative_drift", "entropy", "distance", "relative_distance")
    }
    # One token stands out low in the first layer: it alone is halted, from there on.
    signals["drift"] += 1
    signals["entropy"] += 1
    signals["drift"][0, 0, 3] = signals["entropy"][0, 0, 3] = 0
    alone = summarize(signals | {"received": received})
    expected = received[:-1, 0, 3]
    assert alone.tau_kv == pytest.approx(np.percentile(expected, 95))
    received_LQ = alone.percentiles["received"]
    np.testing.assert_allclose(received_LQ[:-1, 0], expected, rtol=1e-6)
    assert np.isnan(received_LQ[-1]).all()
