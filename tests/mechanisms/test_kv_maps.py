"""The fit against an independent least squares, and maps that must be there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax import ConfigError, InputError
from qs_jax.calibration.fit_maps import _moments
from qs_jax.config import Config, HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.errors import CheckpointError
from qs_jax.mechanisms.kv_maps import KVMaps, extrapolate, select
from qs_jax.testing import tiny_model, tiny_params
from tests.oracle import model as oracle_model
from tests.support import random_tokens

# A relative of Llama with all that sets relatives apart.
MODEL = tiny_model("qwen3", num_layers=4, head_dim=8, sliding_window=9, qkv_bias=True)
QS = QuickSilverConfig(
    halting=HaltingConfig(rule="quota", layers=(1, 2), quota=(0.3, 1.0), entropy=None),
    kv_skip=KVSkipConfig("extrapolate"),
    recent_tokens=2,
)


@pytest.fixture(scope="module")
def params():
    return tiny_params(MODEL)


@pytest.fixture(scope="module")
def maps(params):
    return qs_jax.fit_kv_maps(params, random_tokens(MODEL, 12, 40), (1, 2), MODEL, batch_size=5)


def test_the_fit_is_ridge_least_squares(params, maps):
    """States and pre-RoPE keys come from the engine's own parameters, by NumPy alone."""
    tokens_NT = random_tokens(MODEL, 12, 40)
    states, keys_values = dense_states(params, tokens_NT)
    for index, at in enumerate((1, 2)):
        x = states[at][:, 4:].reshape(-1, MODEL.hidden_size).astype(np.float64)
        x /= np.sqrt((x**2).mean(-1, keepdims=True))
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        penalty = np.sqrt(1e-3 * len(x)) * np.eye(x.shape[1])
        penalty[-1, -1] = 0
        for layer in range(at + 1, MODEL.num_layers + 1):
            y = keys_values[layer][:, 4:].reshape(len(x), -1)
            padded = np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
            expected = np.linalg.lstsq(np.concatenate([x, penalty]), padded, rcond=None)[0]
            ours = np.asarray(maps.maps_LXFO[layer - 1, index])
            np.testing.assert_allclose(ours, expected, atol=2e-4)
        assert not np.asarray(maps.maps_LXFO[:at, index]).any()


def dense_states(params, tokens_NT):
    """States after each layer, and unrotated keys and values of each layer."""
    weights = oracle_model.OracleModel(params, MODEL)
    states, keys_values = {}, {}
    h = np.stack([[weights.embed(int(t), i) for i, t in enumerate(row)] for row in tokens_NT])
    for layer in range(1, MODEL.num_layers + 1):
        a, kv = zip(*[weights.attended(layer, row) for row in h], strict=True)
        keys_values[layer] = np.stack(kv)
        h = states[layer] = np.stack(
            [row + weights.linear("down", layer, weights.neurons(layer, row)) for row in a]
        )
    return states, keys_values


def test_saved_maps_come_back(maps, tmp_path):
    path = maps.save(tmp_path)
    again = KVMaps.load(path)
    assert (again.layers, again.features) == (maps.layers, maps.features)
    assert "tokens" in again.provenance
    np.testing.assert_array_equal(again.maps_LXFO, maps.maps_LXFO)
    np.testing.assert_array_equal(select(again, (2,)).maps_LXFO[:, 0], maps.maps_LXFO[:, 1])
    half = KVMaps.load(maps.save(tmp_path / "half.safetensors", "float16"))
    np.testing.assert_allclose(half.maps_LXFO, maps.maps_LXFO, rtol=1e-3, atol=1e-6)
    assert (tmp_path / "half.safetensors").stat().st_size < path.stat().st_size * 0.6
    with pytest.raises(ConfigError, match=r"none for \[3\]"):
        select(maps, (3,))
    with pytest.raises(CheckpointError, match="no KV maps"):
        KVMaps.load(tmp_path / "other.safetensors")
    (tmp_path / "junk").write_text("not a file of tensors")
    with pytest.raises(CheckpointError, match="does not hold KV maps"):
        KVMaps.load(tmp_path / "junk")


def test_extrapolation_refuses_to_run_without_its_maps(params, maps):
    cfg, tokens_BT = Config(MODEL, QS, continuation_tokens=8), random_tokens(MODEL, width=24)
    for call in (qs_jax.score, qs_jax.generate, qs_jax.stream):
        with pytest.raises(ConfigError, match="needs maps"):
            call(params, tokens_BT, cfg)
    with pytest.raises(ConfigError, match="halting layers"):
        qs_jax.score({**params, "kv_maps": select(maps, (1,))}, tokens_BT, cfg)
    other = tiny_model("llama", num_layers=4, hidden_size=16, head_dim=4)
    with pytest.raises(ConfigError, match="not of this model"):
        qs_jax.score(
            {**tiny_params(other), "kv_maps": maps},
            tokens_BT,
            Config(other, QS, continuation_tokens=8),
        )


def test_each_token_is_read_by_the_map_of_its_own_layer():
    """Tokens of no map, and maps without tokens."""
    rng = np.random.default_rng(0)
    code, maps = rng.normal(size=(2, 20, 5)), rng.normal(size=(3, 5, 2))
    depth, layers = rng.choice([1, 3, 4, 9], (2, 20)), (1, 3, 7)
    found = extrapolate(*map(jnp.asarray, (code, maps, depth)), layers)
    for row, at in np.ndindex(2, 20):
        index = layers.index(depth[row, at]) if depth[row, at] in layers else None
        expected = np.zeros(2) if index is None else code[row, at] @ maps[index]
        np.testing.assert_allclose(found[row, at], expected, atol=1e-5)


def test_bad_fits_are_refused(params):
    tokens_BT = random_tokens(MODEL, 12, 40)
    with pytest.raises(ConfigError, match="between 1 and 3"):
        qs_jax.fit_kv_maps(params, tokens_BT, (4,), MODEL)
    with pytest.raises(ConfigError, match="'state'"):
        qs_jax.fit_kv_maps(params, tokens_BT, (1,), MODEL, features=("lag",))
    with pytest.raises(InputError, match="cannot determine"):
        qs_jax.fit_kv_maps(params, tokens_BT[:1, :10], (1,), MODEL)


def test_a_code_is_reduced_rank_regression(params):
    """Against the truncated SVD of the fitted outputs, with columns scaled by their own spread."""
    tokens_NT, every = random_tokens(MODEL, 12, 40), ("state", "embedding", "previous", "neurons")
    full = qs_jax.fit_kv_maps(params, tokens_NT, (1,), MODEL, features=every)
    coded = qs_jax.fit_kv_maps(params, tokens_NT, (1,), MODEL, features=every, rank=5)
    assert coded.maps_LXFO.shape[2] == coded.encode_XFR.shape[-1] == 5
    x = features_of(params, tokens_NT)
    ours = [
        x @ np.asarray(coded.encode_XFR[0]) @ np.asarray(coded.maps_LXFO[at, 0]) for at in (1, 2, 3)
    ]
    whole = [x @ np.asarray(full.maps_LXFO[at, 0]) for at in (1, 2, 3)]
    penalty = np.sqrt(1e-3 * len(x)) * np.eye(x.shape[1])
    penalty[-1, -1] = 0
    outputs, shrunk, columns = [], [], MODEL.kv_size
    for at, y in zip((1, 2, 3), whole, strict=True):
        extra = penalty @ np.asarray(full.maps_LXFO[at, 0])
        for half in (slice(None, columns), slice(columns, None)):
            both = np.concatenate([y[:, half], extra[:, half]])
            spread = np.sqrt((np.square(both).sum(0) / len(x) - y[:, half].mean(0) ** 2).sum())
            outputs.append(both / spread)
            shrunk.append(ours[at - 1][:, half] / spread)
    left, sizes, right = np.linalg.svd(np.concatenate(outputs, axis=1), full_matrices=False)
    best = (left[:, :5] * sizes[:5]) @ right[:5]
    np.testing.assert_allclose(np.concatenate(shrunk, axis=1), best[: len(x)], atol=5e-3)


def features_of(params, tokens_NT):
    """All features of tokens that stop after layer 1, by NumPy."""
    weights = oracle_model.OracleModel(params, MODEL)
    states, _ = dense_states(params, tokens_NT)
    h = states[1]
    embedded = np.stack(
        [[weights.embed(int(t), i) for i, t in enumerate(row)] for row in tokens_NT]
    )
    previous = np.concatenate([np.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    normed = [x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) for x in (h, embedded, previous)]
    neurons = np.stack([weights.neurons(2, row) for row in h])
    x = np.concatenate([*normed, neurons, np.ones_like(h[..., :1])], axis=-1)
    return x[:, 4:].reshape(-1, x.shape[-1]).astype(np.float64)


def test_features_of_prompts_need_prompts(params):
    tokens_NT = random_tokens(MODEL, 12, 40)
    maps = qs_jax.fit_kv_maps(
        params, tokens_NT, (1, 2), MODEL, features=("state", "previous"), rank=4
    )
    qs = QuickSilverConfig(
        halting=HaltingConfig(layers=(1, 2), entropy=None), kv_skip=KVSkipConfig("extrapolate")
    )
    with pytest.raises(ConfigError, match="is for prompts"):
        qs_jax.score({**params, "kv_maps": maps}, tokens_NT, Config(MODEL, qs))
    with pytest.raises(ConfigError, match="rank must be below"):
        qs_jax.fit_kv_maps(params, tokens_NT, (1,), MODEL, rank=MODEL.hidden_size + 1)


def test_maps_of_more_layers_serve(params, maps):
    """The engine takes those of the layers at which the configuration halts."""
    tokens_BT = random_tokens(MODEL, width=24)
    one = QuickSilverConfig(
        halting=HaltingConfig(rule="quota", layers=(2,), quota=(0.6,), entropy=None),
        kv_skip=KVSkipConfig("extrapolate"),
        recent_tokens=2,
    )
    cfg = Config(MODEL, one, continuation_tokens=8)
    both = qs_jax.score({**params, "kv_maps": maps}, tokens_BT, cfg)
    alone = qs_jax.score({**params, "kv_maps": select(maps, (2,))}, tokens_BT, cfg)
    np.testing.assert_array_equal(both.logprobs, alone.logprobs)
    cost = both.record.kv_written & ~both.record.active
    assert cost.any()
    assert not np.allclose(both.logprobs, qs_jax.score(params, tokens_BT, Config(MODEL)).logprobs)


def test_maps_are_fitted_from_sums_in_float32():
    """Sums over tokens rounded to bfloat16 would spoil what is solved from them."""
    half = MODEL.replace(dtype="bfloat16")
    params = tiny_params(half)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    rows = jnp.asarray(random_tokens(MODEL, batch=4, width=32))
    chosen = (jnp.ones(rows.shape, bool), (1, 3), ("state", "neurons"))
    counted, *static = chosen
    sums = _moments(params, rows, counted, half, *static)
    for ours, theirs in zip(sums, _moments(exact, rows, counted, MODEL, *static), strict=True):
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - theirs) < 0.03 * np.linalg.norm(theirs)
