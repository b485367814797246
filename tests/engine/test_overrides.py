"""Single tokens: who is exempt, who must stop, and calls that make no sense."""

import dataclasses

import numpy as np
import pytest

import qs_jax
from qs_jax import InputError, KVMaps, TokenOverrides
from qs_jax.config import Config, HaltingConfig, KVSkipConfig, QuickSilverConfig
from tests.engine.contract import MATRIX, model_of, params_of
from tests.support import random_tokens

MODEL = model_of("llama")
TOKENS = random_tokens(MODEL, batch=2, width=20)


@pytest.fixture(scope="module")
def params():
    return params_of(MODEL)


def test_full_processing_beats_forced_halting_beats_signals(params):
    never = QuickSilverConfig(
        halting=HaltingConfig(tau_drift=0.0), kv_skip=KVSkipConfig("skip"), sink_tokens=0
    )
    forced, full = np.zeros((2, 20), int), np.zeros((2, 20), bool)
    forced[:, 3:9], full[:, 7:12] = 2, True
    overrides = TokenOverrides(full_processing=full, forced_halt=forced)
    record = qs_jax.score(params, TOKENS, Config(MODEL, never), overrides=overrides).record
    assert (record.depth[:, 3:7] == 2).all()
    assert (record.depth[:, 7:] == MODEL.num_layers).all()
    always = QuickSilverConfig(
        halting=HaltingConfig(tau_drift=1e9, entropy=None, window=(1, 4)), sink_tokens=0
    )
    record = qs_jax.score(params, TOKENS, Config(MODEL, always), overrides=overrides).record
    assert (record.depth[:, 7:12] == MODEL.num_layers).all()
    assert (record.depth[:, :7] == 1).all()


def test_retained_keys_stay(params):
    qs = QuickSilverConfig(
        halting=HaltingConfig(tau_drift=1e9, entropy=None, window=(2, 4)),
        kv_skip=KVSkipConfig("skip", retain_ids=(int(TOKENS[0, 6]),)),
        sink_tokens=0,
    )
    retain = np.zeros((2, 20), bool)
    retain[1, 4] = True
    overrides = TokenOverrides(retain_kv=retain)
    record = qs_jax.score(params, TOKENS, Config(MODEL, qs), overrides=overrides).record
    assert record.kv_written[:, 0, 6].all()
    assert record.kv_written[:, 1, 4].all()
    assert not record.kv_written[3:, 1, 3].any()


def test_protected_ids_and_sinks_are_left_alone(params):
    qs = MATRIX["HKFQ"]
    protect = (int(TOKENS[0, 10]), int(TOKENS[1, 15]))
    cfg = Config(MODEL, dataclasses.replace(qs, protect_ids=protect, sink_tokens=5))
    record = qs_jax.score(params, TOKENS, cfg).record
    exempt = np.isin(TOKENS, protect) | (np.arange(20) < 5)
    assert (record.depth[exempt] == MODEL.num_layers).all()
    assert (record.representative == np.arange(20))[exempt].all()
    assert (record.bits[-1][exempt] == 8).all()
    assert record.kv_held[:, exempt].all()
    assert not record.active.all()


def test_overrides_that_make_no_sense(params):
    mask = np.ones((2, 20), bool)
    extrapolate = QuickSilverConfig(
        halting=HaltingConfig(layers=(1, 3)), kv_skip=KVSkipConfig("extrapolate")
    )
    mapped = Config(MODEL, extrapolate)
    params = {**params, "kv_maps": KVMaps(np.zeros((6, 2, 33, 32), np.float32), (1, 3), ("state",))}
    halts, fuses = Config(MODEL, MATRIX["H"]), Config(MODEL, MATRIX["F"])
    for cfg, overrides, told in (
        (Config(MODEL), TokenOverrides(full_processing=mask), "every mechanism is off"),
        (fuses, TokenOverrides(forced_halt=mask * 2), "halting is off"),
        (halts, TokenOverrides(retain_kv=mask), "no keys are skipped"),
        (halts, TokenOverrides(forced_halt=mask * 6), "layer 6"),
        (halts, TokenOverrides(full_processing=np.ones((3, 20), bool)), "shape"),
        (halts, TokenOverrides(full_processing=np.ones((2, 20))), "dtype"),
        (halts, TokenOverrides(full_processing=np.ones((2, 22), bool)), "shape"),
        (halts, TokenOverrides(forced_halt=[[1], [1, 2]]), "not a regular array"),
        (mapped, TokenOverrides(forced_halt=mask * 2), "there are maps for"),
    ):
        with pytest.raises(InputError, match=told):
            qs_jax.score(params, TOKENS, cfg, overrides=overrides)


def test_prompts_that_do_not_fit(params):
    cfg = Config(MODEL, MATRIX["quota"])
    with pytest.raises(InputError, match="no prompt before its last 128"):
        qs_jax.score(params, TOKENS, cfg)
    for lengths in ([20, 5], [0, 5]):
        with pytest.raises(InputError, match="on both sides"):
            qs_jax.score(params, TOKENS, cfg, prompt_lengths=lengths)
    with pytest.raises(InputError, match="2 integers"):
        qs_jax.score(params, TOKENS, cfg, prompt_lengths=[5])
    with pytest.raises(InputError, match="is for protocol"):
        qs_jax.score(params, TOKENS, Config(MODEL, MATRIX["H"]), prompt_lengths=[5, 5])
