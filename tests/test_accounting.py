"""Counts against closed forms and against XLA's own count of the unrolled dense program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax import accounting
from qs_jax.accounting import entry_bytes, flops
from qs_jax.config import AMQConfig, Config, HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.mechanisms import kv_maps, light
from qs_jax.mechanisms.kv_maps import FEATURES, KVMaps
from qs_jax.mechanisms.light import LightLayer, LightSizes, shared_keys
from qs_jax.models import apply_block, family_of, head, layers
from qs_jax.testing import tiny_model, tiny_params
from tests.engine.contract import LIGHT, MATRIX, model_of, params_of
from tests.support import random_tokens

# Wide enough that norms, RoPE and softmax, which the count leaves out, are far below 1 %.
WIDE = {"hidden_size": 1024, "num_heads": 8, "head_dim": 128, "mlp_size": 4096, "vocab_size": 4096}


def wide_model(kind, num_layers):
    kv = {"num_kv_heads": 4} if kind == "llama" else {"num_kv_heads": 8}
    return tiny_model(kind, **WIDE, **kv, num_layers=num_layers)


def attend_from(queries, keep=None):
    """Attention position by position, to exactly the keys that each query sees.

    `keep` gives keys and values of all positions from those of this group of tokens.
    """

    def attend(q, k, v):
        if keep is not None:
            k, v = keep(k, v)
        outs = [
            jax.nn.dot_product_attention(q[:, n : n + 1], k[:, : i + 1], v[:, : i + 1])
            for n, i in enumerate(queries)
        ]
        return jnp.concatenate(outs, axis=1), None

    return attend


def block_of(model, params, index, *args, **options):
    params_l = jax.tree.map(lambda leaf: leaf[index], params["layers"])
    return apply_block(model, params_l, *args, **options)


def embedded(params, tokens_BT, model):
    pos_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    return family_of(model).embed(model).apply({"params": params["embed"]}, tokens_BT, pos_BT)


def last_of_a_prompt(model, params, h_BTD, pos_T, keys_values):
    """Logits of the last token, the only one that the last layer runs whole."""
    pos_BT, index = jnp.asarray(pos_T)[None], model.num_layers - 1
    kv = block_of(model, params, index, h_BTD[:, :-1], pos_BT[:, :-1], method="keys_values")
    attend = attend_from(pos_T[-1:], lambda *own: keys_values(kv, own))
    h_B1D, _ = block_of(model, params, index, h_BTD[:, -1:], pos_BT[:, -1:], attend)
    return layers.unembed(head.normed(params, h_B1D, model), head.head_table(params))


def joined(*parts):
    """Keys and values of some tokens after those of others."""
    return [jnp.concatenate(pair, axis=1) for pair in zip(*parts, strict=True)]


def xla_flops(program, *shapes):
    return jax.jit(program).lower(*shapes).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("prompt", [0, 12])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_dense_run_agrees_with_xla(kind, prompt):
    """The unrolled program: of a row scored teacher-forced, and of a prompt, whose last layer
    computes keys and values, and the rest for one token."""
    model, width = wide_model(kind, 2), 12

    def unrolled(params, tokens_BT):
        h_BTD = embedded(params, tokens_BT, model)
        pos_BT = jnp.arange(width)[None]
        for index in range(model.num_layers - bool(prompt)):
            given = (h_BTD, pos_BT, attend_from(range(width)))
            h_BTD, _ = block_of(model, params, index, *given)
        if prompt:
            return last_of_a_prompt(model, params, h_BTD, range(width), joined)
        return layers.unembed(head.normed(params, h_BTD, model), head.head_table(params))

    params = jax.eval_shape(lambda: tiny_params(model))
    theirs = xla_flops(unrolled, params, jax.ShapeDtypeStruct((1, width), jnp.int32))
    counted = accounting.dense_tally(np.array([width]), np.array([prompt]), model)["prefill"]
    assert counted["exact_flops"] == counted["exact_flops_dense"]
    assert counted["exact_flops"] == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_light_prompt_agrees_with_xla(kind):
    """The unrolled program: 8 of 12 tokens run layers 2 and 3 of 4 light, and stop."""
    model, width = wide_model(kind, 4), 12
    stops, whole = np.arange(1, 9), np.array([0, 9, 10, 11])
    in_order = np.argsort(np.concatenate([whole, stops]))

    def zeros(*shape, dtype=jnp.float32):
        return jnp.zeros(shape, dtype)

    def light_layer(heads, neurons, code):
        ids = (zeros(size, dtype=jnp.int32) for size in (heads, neurons))
        return LightLayer(*ids, zeros(1024 + neurons + 1, code), zeros(code, 1024))

    def weights():
        read = 3 * 1024 + 768 + 1
        maps = KVMaps(
            zeros(4, 1, 320, 2 * model.kv_size),
            (3,),
            FEATURES,
            encode_XFR=zeros(1, read, 320),
            neurons=(zeros(768, dtype=jnp.int32),),
            light=(light_layer(5, 1024, 256), light_layer(3, 512, 128)),
            light_from=2,
        )
        return tiny_params(model), maps

    def run_light(bound, exact_kv, h_BPD):
        """States of the light tokens after a layer, and keys and values of all."""
        kept = []

        def keep(*own):
            kept.extend(part[:, in_order] for part in joined(exact_kv, own))
            return (shared_keys(part, bound["heads"], model.num_heads) for part in kept)

        given = (h_BPD, jnp.asarray(stops)[None], attend_from(stops, keep), bound["code"])
        return apply_block(model, bound["block"], *given, method="light")[0], kept

    def unrolled(params, maps, tokens_BT):
        given = (jnp.arange(width)[None], attend_from(range(width)))
        embedded_BTD = embedded(params, tokens_BT, model)
        h_BTD, _ = block_of(model, params, 0, embedded_BTD, *given)
        h_BCD, h_BPD, bound = h_BTD[:, whole], h_BTD[:, stops], light.bind(params, maps, model)
        for index in (1, 2):
            found = []

            def keep(*own, index=index, h_BPD=h_BPD, found=found):
                after, kept = run_light(bound.layers[index - 1], own, h_BPD)
                found.append(after)
                return kept

            given = (h_BCD, jnp.asarray(whole)[None], attend_from(whole, keep))
            h_BCD, _ = block_of(model, params, index, *given)
            h_BPD = found[0]
        previous_BPD = jnp.concatenate([h_BCD[:, :1], h_BPD[:, :-1]], axis=1)
        neurons = lambda: apply_block(model, bound.neurons[0], h_BPD, method="mlp_neurons")  # noqa: E731
        sources = kv_maps.sources(h_BPD, embedded_BTD[:, stops], previous_BPD, neurons)
        code = kv_maps.encode(maps, sources, jnp.full((1, 8), 3), jnp.float32, jnp.int32(0))
        columns = kv_maps.mapped(code, maps.maps_LXFO[3, 0])
        mapped = kv_maps.keys_values(columns, jnp.asarray(stops)[None], model)

        def keys_values(kv, own):
            return [part[:, in_order] for part in joined(joined(kv, own), mapped)]

        return last_of_a_prompt(model, params, h_BCD, whole.tolist(), keys_values)

    params, maps = jax.eval_shape(weights)
    theirs = xla_flops(unrolled, params, maps, jax.ShapeDtypeStruct((1, width), jnp.int32))
    record, qs = light_record(model, stops, width), dataclasses.replace(LIGHT, sink_tokens=1)
    qs = dataclasses.replace(qs, halting=dataclasses.replace(qs.halting, layers=(3,), light_from=2))
    counted = accounting.tally(record, model, qs, maps.sizes)["prefill"]
    assert counted["exact_flops"] == pytest.approx(theirs, rel=0.01)
    assert counted["exact_flops"] < 0.75 * counted["exact_flops_dense"]
    halting = dataclasses.replace(qs.halting, light_share=0.5)  # tokens are ranked: D + 1 products
    ranked = dataclasses.replace(qs, halting=halting)
    more = accounting.tally(record, model, ranked, maps.sizes)["prefill"]["exact_flops"]
    assert more - counted["exact_flops"] == record.subject.sum() * 2 * (model.hidden_size + 1)


def light_record(model, stops, width):
    """All of these tokens run every layer but the last."""
    record = accounting.dense_record(np.array([width]), np.array([width]), model)
    active, depth = record.active.copy(), record.depth.copy()
    active[-1, 0, stops], depth[0, stops] = False, model.num_layers - 1
    return dataclasses.replace(
        record,
        active=active,
        depth=depth,
        visible_keys=np.where(active, record.visible_keys, 0),
        protocol="continuation",
    )


def test_the_formulas_by_hand():
    """Llama: N = 4, K = 2, H = 8, D = 32, F = 48; 2 operations a multiply-add."""
    model = tiny_model("llama")
    assert flops.linear_flops(model) == 2 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48)
    assert flops.key_flops(model) == 2 * 2 * 32
    assert flops.head_flops(model) == 2 * 32 * 97
    assert entry_bytes(model)[16] == 2 * 16 * 4
    assert entry_bytes(model.replace(dtype="bfloat16"))[16] == 2 * 16 * 2
    amq = AMQConfig.uniform(4, 1, targets=("kv",), group=8)
    assert entry_bytes(model, amq)[4] == 32 * 4 / 8 + (32 / 8) * 4
    attention = 2 * (32 * 24 + 32 * 2 * 16 + 24 * 32)
    mlp = 2 * 2 * 32 * 10 + 2 * (43 * 6 + 6 * 32)
    light = flops.light_flops(model, LightSizes(heads=3, neurons=10, code=6))
    assert light == (attention, 2 * 2 * 24, mlp)
    gpt2 = tiny_model("gpt2")
    assert flops.linear_flops(gpt2) == 2 * (32 * 96 + 32 * 32 + 2 * 32 * 48)
    expected = 4 * 32**2 + 2 * 4 * (32 + 4 * np.log(10)) + 8 * 32**2
    assert flops.paper_layer_flops(model, 10) == pytest.approx(expected)


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def params(model):
    return params_of(model)


def forced(policy, layer=2, **extra):
    """Every eligible prompt token stops at one layer: savings have a closed form."""
    return QuickSilverConfig(
        halting=HaltingConfig(rule="quota", layers=(layer,), quota=(1.0,), entropy=None),
        kv_skip=KVSkipConfig(policy, **extra),
        sink_tokens=2,
        recent_tokens=4,
        protect_special=False,
    )


def test_forced_halting_saves_what_arithmetic_says(model, params):
    """10 of 16 prompt tokens stop after 2 of 6 layers; 6 continuation tokens run dense."""
    tokens_BT = random_tokens(model, batch=3, width=22)
    cfg = Config(model, forced("skip"), continuation_tokens=6)
    record = qs_jax.score(params, tokens_BT, cfg).record
    counted = accounting.tally(record, model, cfg.quicksilver)
    prefill, decode = counted["prefill"], counted["decode"]
    assert prefill["tokens"] == 3 * 16
    assert decode["tokens"] == 3 * 6
    assert prefill["layer_tokens"] == 3 * (16 * 6 - 10 * 4)
    assert decode["layer_tokens"] == decode["layer_tokens_dense"] == 3 * 6 * 6
    saved = accounting.summary(counted)
    assert saved["prefill"]["layer_tokens_saved"] == pytest.approx(10 * 4 / (16 * 6))
    assert saved["kv_bytes_saved"] == pytest.approx(10 * 4 / (22 * 6))
    assert saved["paper_flops_saved"] == pytest.approx(10 * 4 / (22 * 6))
    # Keys seen: layers 1 and 2 all, then positions 0, 1, 12.. only.
    visible = [0, 1, *range(12, 22)]
    keys = 2 * sum(range(1, 23)) + 4 * sum(1 + sum(k < i for k in visible) for i in visible)
    assert prefill["visible_keys"] + decode["visible_keys"] == 3 * keys
    asked = 3 * sum(i + 1 for i in range(16)) * model.num_heads  # the score looks at all 16 queries
    # The last layer reads the keys of 5 whole prompt tokens, and runs for the last one only.
    unread = 3 * sum(1 + sum(k < i for k in visible) for i in visible[:5])
    exact = (
        3 * (22 * 6 - 10 * 4 - 5) * flops.linear_flops(model)
        + 3 * 5 * flops.keys_values_flops(model)
        + (3 * keys - unread) * flops.key_flops(model)
        + 3 * (1 + 6) * flops.head_flops(model)
        + asked
    )
    assert prefill["exact_flops"] + decode["exact_flops"] == exact
    assert prefill["paper_kv_values_saved"] == 3 * 10 * 4 * 2 * model.kv_size


def test_propagated_keys_are_charged(model, params):
    tokens_BT = random_tokens(model, batch=1, width=22)
    parts = {}
    for policy in ("skip", "propagate"):
        cfg = Config(model, forced(policy), continuation_tokens=6)
        record = qs_jax.score(params, tokens_BT, cfg).record
        parts[policy] = accounting.tally(record, model, cfg.quicksilver)["prefill"]
    kv = 10 * 4 * 2 * model.hidden_size * 2 * model.kv_size
    assert parts["propagate"]["added_flops"] - parts["skip"]["added_flops"] == kv
    assert parts["propagate"]["kv_bytes_held"] == parts["propagate"]["kv_bytes_dense"]


@pytest.mark.parametrize(
    "name", ["HKFQ", *(pytest.param(name, marks=pytest.mark.slow) for name in "HKFQ")]
)
def test_every_mechanism_is_charged_for_its_signals(model, params, name):
    cfg = Config(model, MATRIX[name], continuation_tokens=6)
    record = qs_jax.score(params, random_tokens(model, batch=1, width=26), cfg).record
    counted = accounting.tally(record, model, cfg.quicksilver)
    assert counted["prefill"]["added_flops"] > 0
    read = int((~np.isnan(record.entropy)).sum())
    assert counted["prefill"]["entropy_read"] + counted["decode"]["entropy_read"] == read
    layers_seen = sum(counted[part]["per_layer"]["layer_tokens"][0] for part in counted)
    assert layers_seen == 26


OTHERS = ("shortlist", "variance", "final_prev")


@pytest.mark.parametrize(
    "kind", ["vocab", "latent", *[pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS]]
)
def test_each_estimator_costs_what_it_computes(model, params, kind):
    """One evaluation a token at the AMQ layer; the shortlist is picked by one exact lens."""
    base = {"sink_tokens": 0, "protect_special": False}
    amq = AMQConfig(3, entropy=kind, group=8)
    options = {"shortlist_layer": 2, "shortlist_size": 5} if kind == "shortlist" else {}
    tokens_BT = random_tokens(model, batch=1, width=20)

    def added(quicksilver):
        record = qs_jax.score(params, tokens_BT, Config(model, quicksilver)).record
        return accounting.tally(record, model, quicksilver)["prefill"]["added_flops"]

    plain = added(QuickSilverConfig(amq=AMQConfig.uniform(8, 3, group=8), **base))
    counted = added(QuickSilverConfig(amq=amq, **base, **options))
    d, v = model.hidden_size, model.vocab_size
    cost = {
        "vocab": 2 * d * v + 4 * v,
        "shortlist": 2 * d * v + 2 * d * 5 + 4 * 5,
        "latent": 6 * d,
        "variance": 6 * d,
        "final_prev": 4 * v,  # every position is read out when scoring anyway
    }[kind]
    assert counted - plain == 20 * cost


def test_new_tokens_are_not_charged_under_continuation(model, params):
    qs = dataclasses.replace(MATRIX["HF"], recent_tokens=3)
    cfg = Config(model, qs, protocol="continuation", continuation_tokens=6)
    record = qs_jax.score(params, random_tokens(model, 1, 26), cfg).record
    counted = accounting.tally(record, model, qs)
    assert counted["prefill"]["added_flops"] > 0
    assert counted["decode"]["added_flops"] == 0


def test_maps_must_be_named_to_be_charged(model, params):
    qs = dataclasses.replace(forced("skip"), kv_skip=KVSkipConfig("extrapolate"))
    record = accounting.dense_record(np.array([9]), np.array([4]), model)
    with pytest.raises(qs_jax.ConfigError, match="map_sizes"):
        accounting.tally(record, model, qs)


def test_tallies_add_up(model, params):
    """Rows counted together or one by one give the same sums."""
    cfg = Config(model, MATRIX["HKFQ"])
    rows = [random_tokens(model, 1, 26, seed=seed)[0].tolist() for seed in range(3)]

    def counted(rows):
        return accounting.tally(qs_jax.score(params, rows, cfg).record, model, cfg.quicksilver)

    alone = [counted([row]) for row in rows]
    total = functools.reduce(accounting.add, alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), total, counted(rows))


def test_nothing_saved_is_exactly_nothing():
    model = tiny_model("llama", num_layers=30)
    counted = accounting.dense_tally(np.array([512, 77, 3]), np.array([384, 0, 1]), model)
    saved = accounting.summary(counted)
    for part in (saved, saved["prefill"], saved["decode"]):
        assert part["exact_flops_saved"] == 0
        assert part["paper_flops_saved"] == 0
        assert part["kv_bytes_saved"] == 0
