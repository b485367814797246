"""Light layers as they are fitted, against NumPy's least squares and derivatives of attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax import ConfigError, InputError
from qs_jax.calibration import choose, fit_light, sensitivity
from qs_jax.calibration.fit_light import FittingText, Stream
from qs_jax.config import Config, HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.mechanisms.kv_maps import KVMaps
from tests.oracle.comparison import a_model
from tests.oracle.model import OracleModel, softmax
from tests.support import random_tokens

WIDTH, SKIP = 64, 4
FREE = -1.0  # a price at which everything is kept


@functools.cache
def fitting_text(kind):
    """A random model, and what its dense pass says; tests share them, one stream at a time."""
    model, params = a_model(kind, "float32")
    if model.sliding_window is not None:
        model = model.replace(sliding_window=40)
    tokens_WT = random_tokens(model, 9, WIDTH)
    text = FittingText(params, tokens_WT, model, (2,), skip_first=SKIP, batch_size=4)
    return params, model, tokens_WT, text


class Streams:
    """The dense model's states and those of a light stream, in NumPy float64."""

    def __init__(self, params, model, tokens_WT):
        self.net, embed = OracleModel(params, model), OracleModel(params, model).embed
        rows = [np.stack([embed(int(t), i) for i, t in enumerate(row)]) for row in tokens_WT]
        self.own = self.dense = np.stack(rows)

    def run(self, layer, light=None):
        """One layer on both; of a light one, what its map reads and what it should give."""
        net, before = self.net, self.own
        a = np.stack([net.attended(layer, row)[0] for row in self.dense])
        mlp = np.stack([net.linear("down", layer, net.neurons(layer, row)) for row in a])
        self.own = self.dense = a + mlp
        if light is None:
            return None
        a = np.stack([net.attended(layer, row, light.heads_N.tolist())[0] for row in before])
        kept = np.stack([net.neurons(layer, row) for row in a])[..., light.neurons_M]
        normed = a / np.sqrt((a**2).mean(-1, keepdims=True))
        read = np.concatenate([normed, kept, np.ones((*a.shape[:2], 1))], axis=-1)
        self.own = a + read @ np.asarray(light.encode_FR) @ np.asarray(light.decode_RD)
        self.own[:, :SKIP] = self.dense[:, :SKIP]
        return (x[:, SKIP:].reshape(-1, x.shape[-1]) for x in (read, self.dense - a))


@pytest.mark.parametrize(
    ("kind", "price"),
    [
        ("llama", 0.003),
        ("qwen3", 0.003),
        *(pytest.param("gpt2", p, marks=pytest.mark.slow) for p in (0.003, FREE)),
    ],
)
def test_a_layer_is_fitted_on_the_states_that_light_layers_made(kind, price):
    """The second of two keeps everything: its map is ridge least squares, its code no loss."""
    params, model, tokens_WT, text = fitting_text(kind)
    stream = Stream(text, 2, price)
    first = stream.step()
    stream.price = FREE
    second = stream.step()
    assert second.sizes == (model.num_heads, model.mlp_size, model.hidden_size)
    streams = Streams(params, model, tokens_WT)
    streams.run(1)
    streams.run(2, first)
    if price == FREE:  # a whole layer, up to the ridge
        assert np.abs(streams.own - streams.dense).max() < 0.02 * streams.dense.std()
    else:
        assert len(first.heads_N) < model.num_heads
        assert len(first.neurons_M) < model.mlp_size
    read, missing = streams.run(3, second)
    weight = text.weight_WT[:, SKIP:].reshape(-1).astype(np.float64)
    penalties = 1e-3 * (read**2 * weight[:, None]).sum(0) / weight.sum()
    penalties[: model.hidden_size], penalties[-1] = 1e-3, 0
    expected = ridge(read, missing, weight, penalties + 1e-9)
    found = np.asarray(second.encode_FR) @ np.asarray(second.decode_RD)
    np.testing.assert_allclose(read @ found, read @ expected, atol=2e-3 * missing.std())


def ridge(x, y, weight, penalties):
    """Weighted ridge least squares, as an ordinary one with more rows."""
    root, extra = np.sqrt(weight)[:, None], np.diag(np.sqrt(weight.sum() * penalties))
    rows = np.concatenate([y * root, np.zeros((len(extra), y.shape[1]))])
    return np.linalg.lstsq(np.concatenate([x * root, extra]), rows, rcond=None)[0]


# --- choices ------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
NEURONS = RNG.standard_normal((500, 8)) @ RNG.standard_normal((8, 8)) + 0.3
READS = RNG.standard_normal((8, 3))
COVARIANCE = NEURONS.T @ NEURONS / len(NEURONS)


def removed(kept):
    """Mean squared error of later queries that some neurons remove, by least squares."""
    felt, rows = NEURONS @ READS, NEURONS[:, kept]
    left = felt - rows @ np.linalg.lstsq(rows, felt, rcond=None)[0]
    return ((felt**2).sum() - (left**2).sum()) / len(felt)


def greedy(groups, count):
    """Groups of neurons, each the one that removes most beside those before it, and the gains."""
    kept, gains = [], [0.0]
    for _ in range(count):
        found = {
            at: removed([n for each in (*kept, at) for n in groups[each]])
            for at in range(len(groups))
            if at not in kept
        }
        kept.append(max(found, key=found.get))
        gains.append(found[kept[-1]])
    return kept, np.diff(gains)


def test_neurons_and_heads_are_chosen_by_forward_selection():
    expected, gains = greedy([[n] for n in range(8)], 5)
    chosen, found = choose.neurons(COVARIANCE, READS, 0.0, 5)
    assert chosen.tolist() == expected
    np.testing.assert_allclose(found, gains, rtol=2e-3)
    between = (gains[2] + gains[3]) / 2
    assert choose.neurons(COVARIANCE, READS, between, 8)[0].tolist() == expected[:3]
    expected, gains = greedy([[0, 1], [2, 3], [4, 5], [6, 7]], 3)
    assert choose.heads(COVARIANCE, READS, 2, gains[:2].mean()) == expected[:1]
    assert choose.heads(COVARIANCE, READS, 2, gains[1:].mean()) == sorted(expected[:2])


def test_no_neuron_is_chosen_twice():
    """Where none is worth anything."""
    dead = np.zeros((8, 8))
    assert sorted(choose.neurons(dead, READS, FREE, 8)[0]) == list(range(8))


def test_what_is_left_of_neurons_is_their_residual():
    x = np.concatenate([RNG.standard_normal((500, 3)), np.ones((500, 1))], axis=1)
    z = NEURONS + x @ RNG.standard_normal((4, 8))
    sums = choose.Moments(x.T @ x, x.T @ z, z.T @ z, 500.0)
    left = z - x @ np.linalg.lstsq(x, z, rcond=None)[0]
    np.testing.assert_allclose(choose.left_over(sums, 1e-9), left.T @ left / 500, atol=1e-6)


@pytest.mark.parametrize("outputs", [4, 20])
def test_a_code_is_the_truncated_svd_of_what_is_felt(outputs):
    """With fewer outputs than features, and with more."""
    root = np.triu(RNG.standard_normal((8, 8))) + 3 * np.eye(8)
    whole, metric = RNG.standard_normal((8, outputs)), RNG.standard_normal((outputs, outputs))
    left, sizes, _ = np.linalg.svd(root @ whole @ metric)
    price = (sizes[1] ** 2 + sizes[2] ** 2) / 2 / 10
    given = (root.T @ root, whole, whole @ metric, 10.0, price)
    encode, decode = choose.code(*given, most=4, step=1)
    best = left[:, :2] @ left[:, :2].T
    np.testing.assert_allclose(
        encode @ decode, np.linalg.solve(root, best @ root @ whole), atol=1e-9
    )
    assert choose.code(*given, most=4, step=3)[0].shape == (8, 3)


# --- sensitivity --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_felt_is_the_derivative_of_attention(kind):
    """Of the residual of each of the last queries, by each far key and value of each head."""
    model, params = a_model(kind, "float32")
    layer, first, far = 2, WIDTH * 3 // 4, slice(SKIP, WIDTH * 3 // 4 - sensitivity.FAR // 2)
    h_TD = np.asarray(params["embed"]["tokens"])[random_tokens(model, 1, WIDTH)[0]]
    pos_1T, params_l = jnp.arange(WIDTH)[None], sensitivity.layer_params(params, layer - 1)
    _, _, felt = sensitivity.watched_layer(params_l, h_TD[None], pos_1T, model, SKIP)
    net, heads = OracleModel(params, model), (model.num_heads, model.head_dim)
    q, kv = zip(*[net.qkv(layer, net.norm("attn_norm", layer, x)) for x in h_TD], strict=True)
    q = jnp.asarray(np.stack([net.rotate(x, i) for i, x in enumerate(q)])[first:], jnp.float32)
    shape, share = (2, model.num_kv_heads, model.head_dim), model.num_heads // model.num_kv_heads
    k, v = np.moveaxis(np.stack(kv).reshape(WIDTH, *shape), 1, 0)
    k = np.stack([net.rotate(x, i) for i, x in enumerate(k)])
    k, v = (jnp.asarray(np.repeat(x, share, axis=1), jnp.float32) for x in (k, v))
    mask = jnp.arange(first, WIDTH)[:, None] >= jnp.arange(WIDTH)[None]

    def residual(k, v):
        scores = jnp.einsum("qnh,snh->nqs", q, k) / np.sqrt(model.head_dim)
        weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)
        context = jnp.einsum("nqs,snh->qnh", weights, v).reshape(len(q), -1)
        out = {name: jnp.asarray(leaf[layer - 1]) for name, leaf in params["layers"]["out"].items()}
        bias = jnp.broadcast_to(out.get("bias", 0.0), (len(q), model.hidden_size))
        return h_TD[first:] + context @ out["kernel"] + bias

    size = np.square(residual(k, v)).sum(-1)
    by_key, by_value = (np.asarray(x)[:, :, far] for x in jax.jacobian(residual, (0, 1))(k, v))
    by_key, by_value = (x / np.sqrt(size)[:, None, None, None, None] for x in (by_key, by_value))
    keys = np.square(by_key).sum((0, 1, 2)).reshape(model.num_kv_heads, share, -1).sum(1)
    values = np.einsum("qdsnh,qdsni->nhi", by_value, by_value)
    values = values.reshape(model.num_kv_heads, share, *values.shape[1:]).sum(1)
    np.testing.assert_allclose(felt.key_KH, keys, rtol=2e-4, atol=1e-6 * keys.max())
    np.testing.assert_allclose(felt.value_KHH, values, rtol=2e-4, atol=1e-5 * values.max())
    assert heads[0] == len(by_key[0, 0, 0])


def paid(net, layer, h, first):
    """Attention of queries from `first` on to each token of a row: squared, summed over heads."""
    m, total = net.model, np.zeros(len(h))
    q, kv = zip(*[net.qkv(layer, net.norm("attn_norm", layer, x)) for x in h], strict=True)
    shape, share = (m.num_kv_heads, m.head_dim), m.num_heads // m.num_kv_heads
    keys = np.stack([net.rotate(x[: m.kv_size].reshape(shape), i) for i, x in enumerate(kv)])
    for i in range(first, len(h)):
        for n, query in enumerate(net.rotate(q[i], i)):
            scores = keys[: i + 1, n // share] @ query / np.sqrt(m.head_dim)
            total[: i + 1] += softmax(scores) ** 2
    return total


def test_tokens_are_ranked_by_what_the_last_queries_will_pay():
    """Ridge least squares of its log, from the state before the first light layer."""
    params, model, tokens_WT, text = fitting_text("llama")
    stream = Stream(text, 2, 0.003)
    stream.step()
    found = np.asarray(stream.stop().attended_F)
    streams, first = Streams(params, model, tokens_WT), WIDTH * 3 // 4
    streams.run(1)
    far, total = slice(SKIP, first - sensitivity.FAR // 2), np.zeros(tokens_WT.shape)
    x = streams.dense[:, far]
    x = (x / np.sqrt((x**2).mean(-1, keepdims=True))).reshape(-1, model.hidden_size)
    for layer in range(2, model.num_layers + 1):
        total += np.stack([paid(streams.net, layer, row, first) for row in streams.dense])
        streams.run(layer)
    y = np.log(total[:, far] + 1e-9).reshape(-1, 1)
    read = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    penalties = np.r_[np.full(model.hidden_size, 1e-2), 0.0] + 1e-9
    expected = ridge(read, y - y.mean(), np.ones(len(x)), penalties)
    np.testing.assert_allclose(read @ found, (read @ expected)[:, 0], atol=2e-3 * y.std())


# --- streams ------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_text(monkeypatch):
    """Device arrays while a map is fitted, on a text and on one of four times the windows."""
    monkeypatch.setattr(fit_light, "CHOOSING", 300)
    params, model, *_ = fitting_text("llama")
    sums, peaks = fit_light._sums, []

    def watched(*args):
        peaks[-1] = max(peaks[-1], sum(array.nbytes for array in jax.live_arrays()))
        return sums(*args)

    monkeypatch.setattr(fit_light, "_sums", watched)
    for count in (8, 32):
        tokens_WT = random_tokens(model, count, WIDTH)
        peaks.append(0)
        Stream(FittingText(params, tokens_WT, model, (2,), batch_size=4), 2, 0.003).step()
    assert abs(peaks[1] - peaks[0]) < 4 * WIDTH * model.hidden_size * 4


def test_maps_of_light_layers_come_back_and_serve(tmp_path):
    """What was fitted runs as before it was saved; maps are refused where they do not fit."""
    params, model, tokens_WT, text = fitting_text("llama")
    stream = Stream(text, 2, 0.003)
    stream.step()
    maps = stream.stop()
    again = KVMaps.load(maps.save(tmp_path))
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(maps), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (again.sizes, again.layers, again.light_from) == (maps.sizes, (2,), 2)

    def score(light_from, maps, model=model, share=1.0):
        halting = HaltingConfig(rule="quota", layers=(2,), quota=(1.0,), light_from=light_from)
        halting = dataclasses.replace(halting, light_share=share)
        qs = QuickSilverConfig(halting, KVSkipConfig("extrapolate"), recent_tokens=4)
        cfg = Config(model, qs, continuation_tokens=8)
        return qs_jax.score({**params, "kv_maps": maps}, tokens_WT[:2], cfg)

    assert score(2, maps).record.active[-1].sum() == 2 * 16
    assert score(2, maps, share=0.75).record.active[-1].sum() == 2 * (16 + 12)

    np.testing.assert_array_equal(score(2, maps).logprobs, score(2, again).logprobs)
    with pytest.raises(
        ConfigError, match=r"behind light layers from 2.* runs layers that run whole"
    ):
        score(None, maps)
    with pytest.raises(ConfigError, match="the configuration runs light layers from 2"):
        score(2, maps.replace(light=(), light_from=None))
    with pytest.raises(ConfigError, match="were fitted on other weights"):
        score(2, maps.replace(provenance='{"weights": "other"}'), model.replace(weights="ours"))
    with pytest.raises(ConfigError, match="needs maps that rank tokens"):
        score(2, maps.replace(attended_F=None), share=0.5)
    (light,) = maps.light
    for told, wrong in (
        ("other sizes", {"light": (light.replace(decode_RD=light.decode_RD[:, 1:]),)}),
        ("other sizes", {"light": (light.replace(neurons_M=light.neurons_M[1:]),)}),
        ("name head 4; this model has 4", {"light": (light.replace(heads_N=jnp.array([1, 4])),)}),
        ("name neuron -1", {"neurons": (maps.neurons[0].at[0].set(-1), *maps.neurons[1:])}),
        ("layers that this model does not", {"neurons": (*maps.neurons, maps.neurons[0][:0])}),
        ("do not reach", {"light": (light, light)}),
        ("rank tokens of another model", {"attended_F": maps.attended_F[1:]}),
        ("not of this model", {"maps_LXFO": maps.maps_LXFO[:, :, 1:]}),
    ):
        with pytest.raises(ConfigError, match=told):
            score(2, maps.replace(**wrong))


def test_texts_that_cannot_be_fitted_on_are_refused():
    model, params = a_model("qwen3", "float32")
    with pytest.raises(ConfigError, match="a sliding window of 5 leaves nothing"):
        FittingText(params, random_tokens(model, 9, WIDTH), model, (2,))
    params, model, tokens_WT, text = fitting_text("llama")
    gpt2_params, gpt2, *_ = fitting_text("gpt2")
    long = random_tokens(gpt2, 1, gpt2.max_positions + 1)
    for told, given in (
        ("layer 2 to 3, got 1", (params, tokens_WT, model, (1,))),
        ("layer 2 to 3, got 4", (params, tokens_WT, model, (2, 4))),
        ("of one length, 64 tokens at least", (params, tokens_WT[:, :63], model, (2,))),
        ("of one length", (params, [[5] * 70, [5] * 80], model, (2,))),
        ("no rows", (params, [], model, (2,))),
        ("positions", (gpt2_params, long, gpt2, (2,))),
        ("not those of cfg.model", (gpt2_params, tokens_WT, model, (2,))),
    ):
        with pytest.raises((ConfigError, InputError), match=told):
            FittingText(*given)
    stream = Stream(text, 2, FREE)
    stream.layer = 3
    with pytest.raises(ConfigError, match="last layer, 4, cannot be light"):
        stream.step()
