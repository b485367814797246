"""Where nothing could act, whoever looks is told so, and why."""

import dataclasses

import numpy as np
import pytest

import qs_jax
from qs_jax import QuickSilverConfig, accounting, cli, presets, report, testing
from qs_jax.config import AMQConfig, HaltingConfig, KVSkipConfig
from qs_jax.evaluation.perplexity import cut_windows, evaluate

EXEMPT = 4 + 32  # first and last tokens of a prompt
QUOTA = HaltingConfig(rule="quota", layers=(1,), quota=(1.0,), entropy=None)
ACTS = QuickSilverConfig(QUOTA, KVSkipConfig())
NEVER = QuickSilverConfig(HaltingConfig(tau_drift=0.0, tau_halt=0.0))


@pytest.fixture(scope="module")
def model():
    return testing.tiny_model(max_positions=128)


@pytest.fixture(scope="module")
def params(model):
    return testing.tiny_params(model)


def ids(count, model):
    return np.arange(count) % (model.vocab_size - 8) + 4


@pytest.mark.parametrize("tokens", [1, EXEMPT, EXEMPT + 1])
@pytest.mark.parametrize("bits", ["none", "fake", "int8"])
def test_exempt_prompts_are_those_on_which_nothing_acts(tokens, bits, model, params):
    """`leaves_alone` says beforehand what the record says afterwards."""
    fake = AMQConfig.uniform(4, layer=1, group=8)
    amq = {"none": None, "fake": fake, "int8": presets.int8_cache(model)}[bits]
    qs = dataclasses.replace(ACTS, amq=amq)
    cfg = qs_jax.Config(model, qs, max_new_tokens=2, eos_token_ids=(), protocol="continuation")
    out = qs_jax.generate(params, [ids(tokens, model)], cfg)
    idle = accounting.is_idle(accounting.tally(out.record, model, qs))
    assert qs.leaves_alone(tokens) == (tokens <= EXEMPT and bits == "none")
    assert idle == (qs.leaves_alone(tokens) or (tokens, bits) == (1, "fake"))


@pytest.mark.parametrize(
    ("quicksilver", "prompts", "words"),
    [
        (QuickSilverConfig(), [100], "no mechanism is on"),
        (ACTS, [34, 20], "first 4 and the last 32 tokens of a prompt alone, and here it has 34"),
        (
            dataclasses.replace(ACTS, recent_tokens_over=((64, 10**9),)),
            [100],
            "runs prompts of 100 tokens dense",
        ),
        (ACTS, [], "acts on prompts only, and there is none"),
        (NEVER, [], "no token met the preset's thresholds"),
        (NEVER, [100], "no token of the prompt met the preset's thresholds"),
    ],
)
def test_the_reason_is_the_one_that_holds(quicksilver, prompts, words):
    said = quicksilver.explain_idle(prompts)
    assert words in said
    assert said.startswith("Nothing was left out: ")


@pytest.mark.parametrize(("quicksilver", "width"), [(ACTS, 40), (ACTS, 60), (NEVER, 40)])
def test_an_evaluation_says_so(quicksilver, width, model, params):
    protocol = "continuation" if quicksilver is ACTS else None
    cfg = qs_jax.Config(model, quicksilver, protocol=protocol, continuation_tokens=8)
    found = evaluate(params, cut_windows(ids(2 * width, model).tolist(), width), cfg)
    idle = found["layer_tokens_saved"] == 0
    assert idle == (width == 40)
    prompts = [width - 8] if protocol else []
    assert found["idle"] == (quicksilver.explain_idle(prompts) if idle else None)


@pytest.mark.parametrize("tokens", [40, 60])
def test_a_report_says_so(tokens, model, params):
    cfg = qs_jax.Config(model, ACTS, engine="masked", protocol="continuation")
    cfg = cfg.replace(continuation_tokens=8)
    row = ids(tokens, model).astype(np.int32)
    runs = list(report.trace(params, row, cfg))
    text = report.TextRuns(row, [str(i) for i in row], [report.PresetRuns("mine", cfg, runs)])
    made = report.to_json(report.Report("", {}, text))["text"]["presets"][0]["runs"]
    summary = made["HK"]["summary"]
    assert (summary["subject"], summary["exempt"]) == (tokens - 8, min(tokens - 8, EXEMPT))
    assert summary["halted"] == max(tokens - 8 - EXEMPT, 0)
    assert summary["idle"] == (ACTS.explain_idle([tokens - 8]) if tokens == 40 else None)
    assert made[""]["summary"]["idle"] is None, "the dense model is not idle: it has nothing to do"


def test_generate_says_so(tiny_checkpoint, capsys):
    words = ["--ckpt", str(tiny_checkpoint), "--prompt", "the dog", "--max-new-tokens", "2"]
    assert cli.main(["generate", *words, "--preset", "balanced"]) == 0
    assert "note: Nothing was left out: " in capsys.readouterr().err


def test_every_prompt_preset_acts_on_longer_prompts(model):
    for name in ("balanced", "small-cache"):
        assert not presets.by_name(name, model).leaves_alone(EXEMPT + 1)
