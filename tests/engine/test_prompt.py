"""The prompt engine: the definition's decisions and log-probabilities, on fewer tokens.

Continuations of prompts are scored, in float64: a later token may change the number of slots and so
the order of sums, and no code of a quantised value flips by it.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

import qs_jax
from qs_jax.config import AMQConfig, Config, HaltingConfig, KVSkipConfig
from qs_jax.engine import prompt, prompt_plan, score
from qs_jax.errors import ConfigError
from qs_jax.testing import laws
from tests.engine.contract import (
    ADJACENT,
    BITS,
    FAST,
    FLAG,
    FUSE,
    HALT,
    INT8,
    MATRIX,
    SKIP,
    fast_case,
    few,
    model_of,
    params_of,
    params_under,
    settings,
)
from tests.engine.programs import arguments_of
from tests.oracle.comparison import assert_same_record
from tests.support import OPTIMISED, random_tokens, row_of

LENGTHS, PROMPTS = (31, 17, 24), (22, 9, 15)
MECHANISMS = [name for name in FAST if not name.startswith("dense")]
BY_DEFAULT = (
    "dual-skip",
    "dual-propagate-kv8",
    "dual-extrapolate",
    "quota-fusion-int8",
    "quota-extrapolate",
    "light",
    "dual-skip-qwen3",
    "light-qwen3",
)


@pytest.fixture(autouse=True)
def few_capacities(monkeypatch):
    """Slots that fit rows as short as these, and few choices: each is a body to compile."""
    shorten(monkeypatch)


def shorten(patch):
    patch.setattr(prompt_plan, "SMALLEST_STEP", 8)
    patch.setattr(prompt_plan, "GRANULE", 4)
    patch.setattr(prompt_plan, "STEPS", 2)


@functools.cache
def run(name: str) -> tuple[laws.Runs, qs_jax.ScoreOutput]:
    """Calls of one program, and the definition's of the first."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        params, cfg = fast_case(name, "continuation", engine="compact")
        rows = [row_of(cfg.model, width) for width in LENGTHS]
        runs = laws.run(params, cfg, rows, PROMPTS, step=3)
        changed = len(runs.changed)
        prompts = [PROMPTS[0]] * changed + [*PROMPTS[1:]]
        rows, cfg = [rows[0]] * changed + rows[1:], cfg.replace(engine="masked")
        return runs, qs_jax.score(params, rows, cfg, prompt_lengths=prompts)


@pytest.mark.parametrize("name", few(MECHANISMS, *BY_DEFAULT))
def test_decisions_and_numbers_are_the_definitions(name):
    found, expected = run(name)[0].before, run(name)[1]
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)
    assert (found.record.simulated, expected.record.simulated) == (False, True)
    assert_same_record(found.record, expected.record, expected.record.real)
    acts = not expected.record.active.all() or (expected.record.bits[-1] < 16).any()
    assert acts, "these rows must show the mechanisms"


@pytest.mark.parametrize("name", few(MECHANISMS, *BY_DEFAULT))
def test_the_future_touches_no_earlier_prediction(name):
    laws.check_causality(run(name)[0])


@pytest.mark.parametrize("name", few(MECHANISMS, *BY_DEFAULT))
def test_rows_do_not_depend_on_batch_mates(name):
    laws.check_batch_mates(run(name)[0])


@pytest.mark.parametrize("name", few(MECHANISMS, "dual-skip", "quota-extrapolate"))
def test_rows_do_not_depend_on_padding(name):
    """Alone, a row is padded less: another program."""
    with jax.enable_x64(True):
        laws.check_padding(run(name)[0])


@pytest.mark.parametrize("name", few(["light", "light-gpt2"]))
def test_overrides_are_the_definitions(name):
    """Exempt tokens run light layers whole; tokens can be made to stop only where all do."""
    with jax.enable_x64(True):
        params, cfg = fast_case(name, "continuation", engine="compact")
        rows = random_tokens(cfg.model, 2, 31)
        full, forced = np.random.default_rng(0).random((2, *rows.shape)) < 0.3
        given = {"full_processing": full, "forced_halt": np.where(forced, 4, 0)}
        overrides = qs_jax.TokenOverrides(**given)
        options = {"prompt_lengths": (22, 15), "overrides": overrides}
        found, expected = (
            qs_jax.score(params, rows, cfg.replace(engine=engine), **options)
            for engine in ("compact", "masked")
        )
        halting = dataclasses.replace(cfg.quicksilver.halting, light_share=1.0)
        every = dataclasses.replace(cfg.quicksilver, halting=halting)
        plain = cfg.replace(quicksilver=every)
        plain = qs_jax.score(params, rows, plain, prompt_lengths=(22, 15)).record
        options["overrides"] = qs_jax.TokenOverrides(forced_halt=np.where(forced, 3, 0))
        with pytest.raises(qs_jax.InputError, match="there are maps for"):
            qs_jax.score(params, rows, cfg, **options)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)
    assert_same_record(found.record, expected.record, expected.record.real)
    assert (plain.depth == 4)[full].any()
    may, light = (plain.depth == 4) & ~full, found.record.depth == 4
    assert (light <= may).all()
    assert light[may & forced].all()
    shares = light.sum(1) / may.sum(1)
    ranked = cfg.quicksilver.halting.light_share < 1
    assert (shares < 1).all() if ranked else (shares == 1).all()


STAGED = settings(
    halting=HaltingConfig(rule="quota", layers=(2, 4), quota=(0.5, 0.8), entropy=None),
    kv_skip=KVSkipConfig("skip"),
)


def test_layers_run_on_as_many_slots_as_tokens_compute(monkeypatch):
    """Whole rows up to layer 2, then what the quotas leave, rounded up by less than a granule."""
    model, widths, run_layer = model_of("llama"), set(), prompt._run_layer
    rows = [row_of(model, width) for width in LENGTHS]

    def note(call, carry, *args):
        widths.add(carry.state.h_BTD.shape[1])
        return run_layer(call, carry, *args)

    monkeypatch.setattr(prompt, "_run_layer", note)
    out = qs_jax.score(params_of(model), rows, Config(model, STAGED), prompt_lengths=PROMPTS)
    most = out.record.active.sum(-1).max(-1)
    assert most[4] < most[2] < most[0]
    assert widths == {32, *(-(-most[layer] // 4) * 4 for layer in (2, 4))}


def test_a_sweep_and_near_lengths_share_a_program():
    """Thresholds and halting windows are numbers; lengths come in buckets."""
    model = model_of("llama")
    params, sizes = params_of(model), []
    for tau, last, width in ((0.2, 4, 29), (0.5, 4, 30), (0.9, 3, 32)):
        halting = dataclasses.replace(HALT, tau_drift=tau, window=(1, last))
        cfg = Config(model, settings(halting=halting), protocol="continuation")
        rows = random_tokens(model, 2, width)
        qs_jax.score(params, rows, cfg, prompt_lengths=(width - 9, width - 7))
        sizes.append(score._jit_prompt._cache_size())
    assert sizes[0] == sizes[-1]


REFUSED = [
    ("freeze=False", settings(halting=FLAG, kv_skip=KVSkipConfig("skip"))),
    ("'attended'", settings(halting=HALT, kv_skip=SKIP)),
    ("'final_prev'", settings(halting=dataclasses.replace(HALT, entropy="final_prev"))),
    ("beyond the uniform mean", settings(fusion=FUSE)),
    ("other quantization is simulated", settings(amq=BITS)),
    (
        "other quantization is simulated",
        settings(amq=dataclasses.replace(INT8, targets=("linear", "hidden"))),
    ),
    (
        "bits by the shortlist entropy",
        settings(amq=dataclasses.replace(INT8, entropy="shortlist"), shortlist_layer=1),
    ),
    (
        "have no bits yet",
        settings(
            halting=HaltingConfig(layers=(1, 3), entropy=None),
            kv_skip=KVSkipConfig("extrapolate"),
            amq=AMQConfig.uniform(8, 2, group=8, execution="int8"),
        ),
    ),
]


@pytest.mark.parametrize(("reason", "qs"), REFUSED)
def test_what_cannot_run_here_is_refused_with_the_reason(reason, qs):
    """By name on "compact"; "auto" takes the masked engine."""
    protocol = "teacher-forced" if "final" in reason else "continuation"
    cfg = Config(model_of("llama"), qs, protocol=protocol)
    assert not prompt_plan.runs_fast(cfg, generates=True)
    with pytest.raises(ConfigError, match=f"cannot run this: .*{reason}.* Use engine 'masked'"):
        prompt_plan.runs_fast(cfg.replace(engine="compact"), generates=True)


def test_teacher_forced_scoring_and_fusion_of_new_tokens_are_the_definitions():
    model = model_of("llama")
    params, rows = params_of(model), random_tokens(model, 2, 20)
    cfg = Config(model, MATRIX["H"])
    assert qs_jax.score(params, rows, cfg).record.simulated
    with pytest.raises(ConfigError, match="teacher-forced scoring is the masked engine's"):
        qs_jax.score(params, rows, cfg.replace(engine="compact"))
    fuses = Config(model, settings(fusion=ADJACENT), max_new_tokens=2)
    out = qs_jax.generate(params, rows, fuses)
    assert (out.record.simulated, out.kv_bytes) == (True, 0)
    with pytest.raises(ConfigError, match="fusion of new tokens"):
        qs_jax.generate(params, rows, fuses.replace(engine="compact"))


@pytest.mark.parametrize("name", ["random", pytest.param("light", marks=pytest.mark.slow)])
def test_no_layer_copies_the_states_or_the_cache(name):
    """Read off the compiled program of a prompt: what reads them comes before they change."""
    model, qs = model_of("llama"), FAST["light"]
    if name == "random":
        quota = HaltingConfig(rule="quota", layers=(2,), quota=(0.5,), score=name, entropy=None)
        qs = settings(halting=quota, kv_skip=KVSkipConfig("skip"))
    cfg = Config(model, qs, max_new_tokens=1)
    rows = random_tokens(model, batch=3, width=40)
    start = lambda: qs_jax.generate(params_under(cfg), rows, cfg)  # noqa: E731
    program, arrays, static = arguments_of(start, "fast", "jit_start")
    text = program.lower(*arrays, **static).compile(compiler_options=OPTIMISED).as_text()
    heads = (model.num_kv_heads, model.head_dim)
    for sizes in ((*rows.shape, model.hidden_size), (model.num_layers, *rows.shape, *heads)):
        shape = re.escape(f"f32[{','.join(map(str, sizes))}]")
        assert re.search(rf"= {shape}\S* ", text), "they are in the program"
        copies = re.findall(rf"= {shape}\S* copy\(%?get-tuple-element.*", text)
        assert copies == [], f"{len(copies)} copies of {shape}"
    assert "signals/jit(norm)" not in text, "neither reads how far a layer moved the states"
