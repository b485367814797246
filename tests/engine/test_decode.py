"""The decode engine: the masked engine's tokens from compact caches and from fewer layers."""

import dataclasses
import functools
import gc
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.config import (
    AMQConfig,
    Config,
    HaltingConfig,
    KVSkipConfig,
    QuickSilverConfig,
)
from qs_jax.engine import decode, pack, token_loop, weights
from qs_jax.engine import generate as engine
from qs_jax.engine.cache import position_dtype
from qs_jax.testing import tiny_model, tiny_params
from tests.engine.contract import CASES, HALT, LAYERS, model_of, params_of, settings
from tests.support import OPTIMISED, random_tokens, row_of

HALF = HaltingConfig(drift="relative", tau_drift=float("inf"), entropy=None, layers=(3,))


def leaving(policy="skip", **kwargs) -> QuickSilverConfig:
    """Every token leaves after layer 3 of 6."""
    return QuickSilverConfig(
        halting=HALF,
        kv_skip=KVSkipConfig(policy, **kwargs),
        sink_tokens=0,
        recent_tokens=0,
        protect_special=False,
    )


# The dual rule where nobody passes: only overrides stop a token.
KEEPING = QuickSilverConfig(
    halting=HaltingConfig(tau_drift=float("-inf"), entropy=None, layers=(3,)),
    kv_skip=KVSkipConfig("skip"),
    sink_tokens=0,
    recent_tokens=0,
)

# tests/engine/test_laws.py compares this engine with scoring on all others.
SETTINGS = {name: case for name, case in CASES.items() if name.startswith(("HKFQ", "quota"))} | {
    "dense": ("gpt2", None, None),
    "skip": ("llama", settings(halting=HALT, kv_skip=KVSkipConfig("skip")), "teacher-forced"),
    "skip-delay-retain": ("gpt2", leaving(delay=1, retain_ids=(5, 8, 40)), "teacher-forced"),
    "leave-propagate": ("llama", leaving("propagate"), "teacher-forced"),
    "final-prev": (
        "llama",
        settings(
            halting=dataclasses.replace(HALT, entropy="final_prev"), kv_skip=KVSkipConfig("skip")
        ),
        "teacher-forced",
    ),
}
ROWS = (9, 20, 4)


def rows_of(model):
    return [row_of(model, width) for width in ROWS]


def config(name, **changes):
    kind, qs, protocol = SETTINGS[name]
    model = model_of(kind)
    if qs is not None and qs.amq is not None:  # a code's edge may fall either side in float32
        model = model.replace(dtype="float64")
    given = {"max_new_tokens": 8, "eos_token_ids": (), "decode_weights": "stacked"} | changes
    return Config(model, qs, protocol=protocol, **given)


def assert_same(ours, theirs):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    if theirs.record is None:
        assert ours.record is None
        return
    for field in dataclasses.fields(theirs.record):
        mine, other = getattr(ours.record, field.name), getattr(theirs.record, field.name)
        if field.name in ("drift", "entropy"):
            both = np.isfinite(mine) & np.isfinite(other)  # computed where a decision reads it
            np.testing.assert_allclose(mine[both], other[both], atol=1e-3, err_msg=field.name)
        elif field.name != "simulated":
            np.testing.assert_array_equal(mine, other, field.name)


KINDS = ("stacked", pytest.param("separate", marks=pytest.mark.slow))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "skip")) for name in SETTINGS],
)
def test_the_masked_engine_and_this_one_agree(name, kind):
    cfg = config(name)
    with jax.enable_x64(cfg.model.dtype == "float64"):
        params, rows = params_of(cfg.model), rows_of(cfg.model)
        masked = qs_jax.generate(params, rows, cfg.replace(engine="masked"))
        ours = qs_jax.generate(params, rows, cfg.replace(decode_weights=kind))
        assert_same(ours, masked)
        assert ours.kv_bytes <= masked.kv_bytes * 1.25


def kv_bytes_and_skip_rate(cfg: Config, rows) -> tuple[int, int, float]:
    """Bytes allocated by the dense model and by ours, and the share of keys that ours skips."""
    params = params_of(cfg.model)
    dense = qs_jax.generate(params, rows, cfg.replace(quicksilver=None))
    out = qs_jax.generate(params, rows, cfg)
    skipped = 1 - out.record.kv_held.sum() / (LAYERS * out.record.lengths.sum())
    return dense.kv_bytes, out.kv_bytes, skipped


def test_bytes_fall_as_keys_are_skipped():
    """Every prompt token leaves at half depth, and every new one: half of the bytes go."""
    given = {"max_new_tokens": 16, "eos_token_ids": (), "decode_weights": "stacked"}
    cfg = Config(model_of("llama"), leaving(), **given)
    dense, own, skipped = kv_bytes_and_skip_rate(cfg, random_tokens(cfg.model, 1, 96))
    assert skipped > 0.49
    model = cfg.model
    slot = 2 * model.num_kv_heads * model.head_dim * 4
    # Three layers hold 96 + 15 tokens, three nothing: they have the least room there is, a position
    # of two bytes a slot, and a count.
    assert dense == LAYERS * pack.bucket(111) * slot
    kept = 3 * (pack.bucket(111) * slot + pack.SMALLEST * (slot + 2) + 4)
    assert own == kept
    assert 1 - own / dense > 0.9 * skipped


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0.25, 0.5, 0.75])
def test_bytes_fall_as_a_quota_stops_a_prompt(stop):
    """A round prompt, a round share of it and the last token, which always runs."""
    quota = HaltingConfig(rule="quota", layers=(2,), quota=(stop,), score="random", entropy=None)
    qs = QuickSilverConfig(
        halting=quota,
        kv_skip=KVSkipConfig("skip"),
        protect_special=False,
        sink_tokens=0,
        recent_tokens=1,
    )
    given = {"max_new_tokens": 16, "eos_token_ids": (), "decode_weights": "stacked"}
    cfg = Config(model_of("llama", max_positions=512), qs, **given)
    dense, own, skipped = kv_bytes_and_skip_rate(cfg, random_tokens(cfg.model, 2, 256))
    assert skipped > 0.6 * stop
    assert 1 - own / dense >= 0.9 * skipped


@pytest.mark.slow
def test_positions_that_16_bits_cannot_tell_from_an_empty_slot_take_32(monkeypatch):
    assert position_dtype(2**16 - 1) == np.uint16
    assert position_dtype(2**16) == np.int32
    cfg = Config(model_of("llama"), leaving(), max_new_tokens=6, eos_token_ids=())
    params, rows = params_of(cfg.model), rows_of(cfg.model)
    out = qs_jax.generate(params, rows, cfg)
    monkeypatch.setattr(pack, "position_dtype", lambda _: np.dtype(np.int32))
    jax.clear_caches()
    assert_same(qs_jax.generate(params, rows, cfg), out)


@pytest.mark.slow
def test_new_tokens_that_stay_where_the_prompt_left_get_room():
    """Prompts leave at half depth by force, new tokens never do: the estimate must give way."""
    cfg = Config(model_of("llama"), KEEPING, max_new_tokens=32, eos_token_ids=())
    params, rows = params_of(cfg.model), random_tokens(cfg.model, 2, 40)
    forced = qs_jax.TokenOverrides(forced_halt=np.full(rows.shape, 3))
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(decode.run_until, n=2)
    program = jax.jit(counted, static_argnames=decode._STATIC, donate_argnames=("state",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "jit_run_until", program)
        out = qs_jax.generate(params, rows, cfg, overrides=forced)
    masked = qs_jax.generate(params, rows, cfg.replace(engine="masked"), overrides=forced)
    assert_same(out, masked)
    assert (masked.record.kv_held[3:, :, :39].sum(), masked.record.kv_held[3:, :, 40:].all()) == (
        0,
        True,
    )
    steps = list(qs_jax.stream(params, rows, cfg, overrides=forced))
    np.testing.assert_array_equal(np.stack([s.tokens for s in steps], 1), out.tokens)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("skip", "separate"), ("propagate", "stacked"))
    ],
)
def test_int8_caches_hold_what_the_masked_engine_reads(policy, kind):
    """Codes take a byte, their steps the rest; what they stand for is the same."""
    amq = AMQConfig.uniform(4, 2, targets=("kv",), group=4, execution="int8")
    qs = dataclasses.replace(leaving(policy), halting=dataclasses.replace(HALF, layers=(5,)))
    model = model_of("llama").replace(dtype="float64")
    with jax.enable_x64(True):
        cfg = Config(model, dataclasses.replace(qs, amq=amq), max_new_tokens=12, eos_token_ids=())
        params, rows = params_of(model), rows_of(model)
        masked = qs_jax.generate(params, rows, cfg.replace(engine="masked"))
        out = qs_jax.generate(params, rows, cfg.replace(decode_weights=kind))
        assert_same(out, masked)
        floats = qs_jax.generate(params, rows, cfg.replace(quicksilver=qs, decode_weights=kind))
        assert np.abs(out.logprobs - floats.logprobs).max() > 1e-3, "4 bits must show"
    heads, dim = model.num_kv_heads, model.head_dim
    room = pack.bucket(20 + 15)  # of 16 new tokens, a bucket of 12, the last is not run
    # Coded are the layers 3 to 6; after the fifth, where all leave, "skip" keeps nothing.
    slots = {"skip": 3 * room + pack.SMALLEST, "propagate": 4 * room}[policy] * len(ROWS)
    saved = 2 * slots * (heads * dim * (8 - 1) - heads * 8)  # codes of one byte, a step a head
    assert floats.kv_bytes - out.kv_bytes == saved


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_halts_runs_no_deeper_layer(kind):
    """The deeper layers' weights are not a number: whoever runs one cannot hide it."""
    model = model_of("llama")
    params = params_of(model)
    given = {"max_new_tokens": 6, "eos_token_ids": (), "decode_weights": kind}
    cfg = Config(model, leaving(), **given)
    plain = qs_jax.generate(params, rows_of(model), cfg)
    poison = jax.tree.map(lambda leaf: leaf.at[3:].set(jnp.nan), params["layers"])
    _, padded, numbers, plan = engine._prepare(params, rows_of(model), cfg, None, None, None)
    state = token_loop.jit_start(params, *padded, numbers, model=model, plan=plan)
    poisoned = params | {"layers": poison}
    decoder = decode.Decoder(poisoned, numbers, cfg, plan, len(padded.lengths_B))
    state = decoder.finish(state)
    assert np.asarray(state.finite_B).all()
    np.testing.assert_array_equal(np.asarray(state.tokens_BM)[:, :6], plain.tokens)


def lowered(cfg, params, tokens, entry="run_until"):
    _, padded, numbers, plan = engine._prepare(params, tokens, cfg, None, None, None)
    static = {"model": cfg.model, "plan": plan}
    shapes = jax.eval_shape(functools.partial(token_loop.start, **static), params, *padded, numbers)
    state = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    decoder = decode.Decoder(params, numbers, cfg, plan, len(padded.lengths_B))
    state = decoder.room(state)
    args = (decoder.params, decoder.layers, state)
    if entry == "run_until":
        return decode.jit_run_until.trace(*args, jnp.int32(9), numbers, **decoder.static)
    return decode.jit_advance.trace(*args, numbers, **decoder.static)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dense", "skip"])
def test_no_step_copies_a_cache(name, kind):
    """Read off the compiled program: no copy as large as a segment's keys outside the entry."""
    cfg = config(name, decode_weights=kind, max_new_tokens=64)
    params = params_of(cfg.model)
    program = lowered(cfg, params, [[1, 2, 3] * 10]).lower().compile(compiler_options=OPTIMISED)
    text = program.as_text()
    shape = rf"f32\[(?:\d+,)?\d\d,{cfg.model.kv_size}\]"
    assert re.search(rf"{shape}\S* dynamic-update-slice\(", text), "the caches are in the program"
    loop = text[: text.index("\nENTRY")]
    copies = re.findall(rf"= {shape}\S* copy(?:-start)?\(", loop)
    assert copies == [], f"{len(copies)} copies of a cache in the loop"


LOWERED = {
    (name, entry, kind): name == "dense" or (entry, kind) == ("run_until", "stacked")
    for name in ("dense", "HKFQ-llama-teacher-forced", "quota-llama-continuation")
    for entry in ("run_until", "advance")
    for kind in ("separate", "stacked")
}


@pytest.mark.parametrize(
    ("name", "entry", "kind"),
    [pytest.param(*key, marks=[pytest.mark.slow] * (not shown)) for key, shown in LOWERED.items()],
)
def test_every_program_lowers_for_cuda(name, entry, kind):
    cfg = config(name, decode_weights=kind)
    with jax.enable_x64(cfg.model.dtype == "float64"):
        params = params_of(cfg.model)
        traced = lowered(cfg, params, [[1, 2, 3]], entry)
        assert "stablehlo.dot" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_separate_weights_live_as_long_as_the_parameters():
    model = tiny_model()
    params = tiny_params(model)
    layers = weights.separate(params)
    assert weights.separate(dict(params)) is layers
    chex.assert_trees_all_equal(layers[1], jax.tree.map(lambda leaf: leaf[1], params["layers"]))
    assert len(weights._kept) == 1
    del params, layers
    gc.collect()
    assert weights._kept == {}


def test_memory_does_not_grow_from_call_to_call():
    cfg = config("skip")
    params, rows = params_of(cfg.model), rows_of(cfg.model)
    counts = []
    for _ in range(3):
        qs_jax.generate(params, rows, cfg)
        gc.collect()
        counts.append(len(jax.live_arrays()))
    assert counts[2] == counts[1]
