"""Every jitted entry point lowers for CUDA, as GPUs run it."""

import re

import jax
import numpy as np
import pytest

import qs_jax
from qs_jax.calibration.fit_maps import _moments
from qs_jax.calibration.observe import _signals
from qs_jax.calibration.sensitivity import layer_params, watched_layer
from qs_jax.config import Config, Speculation
from qs_jax.models import cpu
from qs_jax.testing import toy_tokenizer
from tests.engine.contract import FAST, MATRIX, model_of, params_of, params_under
from tests.engine.programs import arguments_of
from tests.support import random_tokens

SAMPLED = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}
MODEL = model_of("llama", mlp_size=56)  # no other test's: programs traced for CPU are not reused
TOKENS = random_tokens(MODEL, width=16)


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch):
    monkeypatch.setattr(cpu, "on_cpu", lambda: False)


def score(qs, protocol=None, **options):
    given = {"prompt_lengths": (10, 12)} if protocol == "continuation" else {}
    cfg = Config(MODEL, qs, protocol=protocol)
    return lambda: qs_jax.score(params_under(cfg), TOKENS, cfg, **given, **options)


def generate(qs, protocol=None, **settings):
    cfg = Config(MODEL, qs, protocol=protocol, max_new_tokens=16, **settings)
    return lambda: qs_jax.generate(params_of(MODEL), TOKENS, cfg)


def resume(qs):
    cfg = Config(MODEL, qs, max_new_tokens=16, stop="ab", logits_processors=(shifted,))
    cache = qs_jax.prefill(params_of(MODEL), TOKENS, cfg)
    given = {"cache": cache, "tokenizer": toy_tokenizer()}
    return lambda: qs_jax.generate(params_of(MODEL), TOKENS, cfg, **given)


def shifted(logits_BV, so_far):
    return logits_BV - so_far.lengths_B[:, None]


def stream(qs, protocol=None):
    cfg = Config(MODEL, qs, protocol=protocol, max_new_tokens=16)
    return lambda: list(qs_jax.stream(params_of(MODEL), TOKENS, cfg))


PROGRAMS = {
    "dense": (score(None), "score", "_jit_dense"),
    "dense-logits": (score(None, return_logits=True), "score", "_jit_dense"),
    "masked": (score(MATRIX["HKFQ"]), "score", "_jit_masked"),
    "masked-int8": (score(MATRIX["int8"]), "score", "_jit_masked"),
    "masked-quota": (score(MATRIX["quota"], "continuation"), "score", "_jit_masked"),
    "prompt-dual": (score(FAST["dual-skip"], "continuation"), "score", "_jit_prompt"),
    "prompt-int8": (score(FAST["quota-fusion-int8"], "continuation"), "score", "_jit_prompt"),
    "prompt-light": (score(FAST["light"], "continuation"), "score", "_jit_prompt"),
    "start": (generate(None), "fast", "jit_start"),
    "start-sampled": (generate(None, **SAMPLED), "fast", "jit_start"),
    "start-dual": (generate(FAST["dual-skip"]), "fast", "jit_start"),
    "rescore": (generate(MATRIX["HKFQ"]), "rescore", "_rescore"),
    "fill": (lambda: resume(None), "fast", "jit_fill"),
    "resume": (lambda: resume(FAST["dual-skip"])(), "fast", "jit_resume"),
    "loop": (generate(None, **SAMPLED), "decode", "jit_run_until"),
    "loop-dual": (generate(FAST["dual-skip"]), "decode", "jit_run_until"),
    "loop-int8": (generate(FAST["dual-int8"]), "decode", "jit_run_until"),
    "loop-drafts": (generate(None, speculate=Speculation()), "decode", "jit_run_until"),
    "step": (stream(FAST["dual-skip"]), "decode", "jit_advance"),
    "step-quota": (stream(FAST["quota-fusion-int8"], "continuation"), "decode", "jit_advance"),
}
LATE = ("loop-int8", "step-quota", "prompt-light")  # much is traced, or runs before


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LATE)) for n in PROGRAMS]
)
def test_it_lowers_for_cuda(name):
    program, arrays, static = arguments_of(*PROGRAMS[name])
    text = program.trace(*arrays, **static).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.dot_general" in text
    assert "stablehlo.while" in text, "the layers are one scan"
    assert name.endswith(("int8", "step-quota")) == bool(
        re.search(r"dot_general.*xi8>.*xi32>", text)
    )


@pytest.mark.parametrize("name", ["fit_maps", "watched_layer", "observe"])
def test_calibration_lowers_for_cuda(name):
    params, every = params_of(MODEL), np.ones(TOKENS.shape, bool)
    if name == "fit_maps":
        static = {"model": MODEL, "chosen": (2, 4), "features": ("state", "neurons")}
        function, arrays = _moments, (params, TOKENS, every)
    elif name == "watched_layer":
        static, h_BTD = {"model": MODEL, "skip_first": 4}, params["embed"]["tokens"][TOKENS]
        function, arrays = watched_layer, (layer_params(params, 2), h_BTD, every.cumsum(1) - 1)
    else:
        static = {"model": MODEL}
        function, arrays = _signals, (params, TOKENS, np.argsort(TOKENS)[:, :4])
    traced = jax.jit(function, static_argnames=tuple(static)).trace(*arrays, **static)
    assert "stablehlo.dot_general" in traced.lower(lowering_platforms=("cuda",)).as_text()
