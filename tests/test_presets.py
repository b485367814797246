"""Presets as functions and files, and configurations that are refused with the reason."""

import json

import numpy as np
import pytest
from hypothesis import given

import qs_jax
from convert.hf_to_flax import convert
from qs_jax import ConfigError, cli, presets
from qs_jax.config import (
    AMQConfig,
    Config,
    FusionConfig,
    HaltingConfig,
    KVSkipConfig,
    QuickSilverConfig,
)
from qs_jax.mechanisms.kv_maps import KVMaps
from qs_jax.testing import tiny_model
from tests.convert.folders import llama_tensors, write_folder
from tests.oracle.strategies import any_case
from tests.support import random_tokens

MODEL = tiny_model("llama", num_layers=6)
DEEP = tiny_model("llama", num_layers=30)


@pytest.mark.parametrize("name", presets.NAMES)
@pytest.mark.parametrize("layers", [2, 6, 30])
def test_every_preset_fits_every_depth_and_survives_its_file(name, layers, tmp_path):
    model = tiny_model("gpt2", num_layers=layers)
    qs = presets.by_name(name, model)
    Config(model, qs)
    path = presets.save(tmp_path / "preset.json", qs, model)
    again = presets.by_name(str(path), model)
    assert again == qs
    assert dict(again.provenance).items() >= dict(qs.provenance).items()


SMOLLM2 = DEEP.replace(
    vocab_size=49152,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_size=1536,
    max_positions=8192,
)


@pytest.mark.parametrize("name", presets.SHIPPED)
def test_a_shipped_preset_is_for_its_model_and_comes_with_its_maps(name):
    qs, path = presets.by_name(name, SMOLLM2), presets.shipped_maps(SMOLLM2, name)
    assert (path is not None) == (qs.kv_skip.policy == "extrapolate")
    verified = qs.provenance["verified"]
    assert verified["within_budget"]
    assert verified["upper_bound"] <= qs.provenance["max_ppl_increase"]
    assert presets.shipped_maps(DEEP, name) is None
    # Other weights of these sizes, such as a fine-tune, get neither; those of its own get both.
    tuned, own = SMOLLM2.replace(weights="another"), qs.provenance["weights"]
    assert presets.shipped_maps(tuned, name) is None
    with pytest.raises(ConfigError, match=f"verified on other weights .{own}.*--allow-other"):
        presets.by_name(name, tuned)
    assert presets.by_name(name, tuned.replace(weights=own)) == qs
    if path is not None:
        maps = KVMaps.load(path)
        assert maps.layers == qs.halting.layers
        assert maps.light_from == qs.halting.light_from
        maps.check(SMOLLM2)
        with pytest.raises(ConfigError, match=f"fitted on other weights .{own}.*--allow-other"):
            maps.check(tuned)


@pytest.mark.parametrize("name", presets.SHIPPED)
def test_a_shipped_preset_is_verified_at_two_lengths_and_a_start_for_other_models(name):
    qs = presets.by_name(name, SMOLLM2)
    assert qs.provenance["max_ppl_increase"] == 0.2
    lengths = qs.provenance["verified"]["lengths"]
    assert lengths.keys() == {"512", "2048"}
    for entry in lengths.values():
        assert entry["upper_bound"] <= 0.2
        assert entry["retrieval"]["lost"] == 0
    assert presets.by_name(name, DEEP).kv_skip.policy == "skip"


@pytest.mark.parametrize(
    ("tokens", "verified"), [(256, False), (257, True), (512, True), (513, False), (2048, False)]
)
def test_a_length_at_which_a_preset_was_not_verified_is_told(tokens, verified):
    """A verified length covers those down to half of it; one that failed covers none."""
    lengths = {"512": {"within_budget": True}, "2048": {"within_budget": False}}
    halting = HaltingConfig(rule="quota", layers=(2,), quota=(0.5,), entropy=None)
    qs = QuickSilverConfig(halting, provenance={"verified": {"lengths": lengths}})
    line = presets.unverified(qs, tokens)
    assert (line is None) == verified
    assert line is None or line.startswith("this preset was verified at 512 tokens, not at")
    assert presets.unverified(QuickSilverConfig(halting), tokens) is None
    assert presets.unverified(presets.off(MODEL), tokens) is None


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A checkpoint, and another of its sizes with one tensor changed."""
    folder, tensors = tmp_path_factory.mktemp("tuned"), llama_tensors()[0]
    convert(str(write_folder(folder / "hf", tensors)), folder / "own")
    tensors["model.layers.2.mlp.up_proj.weight"] += 0.01
    convert(str(write_folder(folder / "hf", tensors)), folder / "other")
    return folder


def test_presets_and_maps_are_bound_to_weights(tuned, tmp_path, capsys):
    """By file and beside the checkpoint; --allow-other-weights takes them all the same."""
    params, model = qs_jax.load(tuned / "own")
    halting = HaltingConfig(rule="quota", layers=(1,), quota=(0.5,), entropy=None)
    qs = QuickSilverConfig(halting, KVSkipConfig("extrapolate"), recent_tokens=2)
    path = presets.save(tmp_path / "mine.json", qs, model)
    maps = qs_jax.fit_kv_maps(params, random_tokens(model, 8, 40), (1,), model)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 9)

    def run(ckpt, *flags):
        words = ["generate", "--prompt", "the quick brown fox", "--max-new-tokens", "2"]
        code = cli.main([*words, "--quiet", "--ckpt", str(ckpt), "--preset", str(path), *flags])
        return code, capsys.readouterr().err

    for place in (path.with_name("mine.kv_maps.safetensors"), tuned / "other"):
        saved = maps.save(place)
        assert run(tuned / "own", "--kv-maps", str(saved)) == (0, "")
        code, error = run(tuned / "other")
        assert code == 1
        assert "mine.json was verified on other weights" in error
        presets.save(path, qs)  # which is bound to none
        code, error = run(tuned / "other")
        assert code == 1
        assert f"{saved}: these KV maps were fitted on other weights" in error
        assert model.weights in error
        assert run(tuned / "other", "--allow-other-weights") == (0, "")
        saved.unlink()
        presets.save(path, qs, model)


def test_the_paper_preset_holds_the_papers_numbers():
    """Its sections B.2, C, D.3, E, G.2 to G.4, at its own depth of 30."""
    qs = presets.paper(DEEP)
    assert qs.halting.tau_drift == 1.0
    assert qs.halting.tau_halt == pytest.approx(0.797, abs=1e-3)
    assert (qs.halting.window, qs.halting.min_layer) == ((6, 24), 5)
    assert (qs.fusion.tau_fuse, qs.fusion.first_layer) == (0.15, 12)
    assert (qs.amq.layer, qs.amq.tau_low, qs.amq.tau_high) == (15, 1.0, 2.3)
    assert (qs.amq.entropy, qs.amq.execution) == ("latent", "int8")
    lens = presets.by_name("paper-bits-vocab", DEEP).amq
    assert (lens.entropy, lens.execution) == ("vocab", "fake")
    assert presets.by_name("paper-drift-0.045", DEEP).halting.tau_drift == 0.045
    minmax = presets.by_name("paper-bits-minmax", DEEP).amq
    assert (minmax.normalization, minmax.tau_low, minmax.tau_high) == ("minmax", 0.3, 0.6)


@given(any_case())
def test_settings_survive_json(case):
    qs = case["quicksilver"]
    assert QuickSilverConfig.from_dict(json.loads(json.dumps(qs.to_dict()))) == qs


def test_files_that_are_no_presets(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(ConfigError, match="unknown preset 'fast'; known: off, paper"):
        presets.by_name("fast", MODEL)
    with pytest.raises(ConfigError, match="cannot read"):
        presets.load(path, MODEL)
    for text, message in (
        ("{", "cannot read"),
        ("[]", "not a preset"),
        ('{"format": "qs-jax preset", "version": 2}', "version 1"),
        ('{"format": "qs-jax preset", "version": 1}', "no quicksilver"),
        ('{"format": "qs-jax preset", "version": 1, "quicksilver": []}', "no quicksilver"),
        (
            '{"format": "qs-jax preset", "version": 1, "quicksilver": {}, "provenance": []}',
            "provenance objects",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            presets.load(path, MODEL)
    presets.save(path, presets.paper(DEEP), DEEP)
    with pytest.raises(ConfigError, match="num_layers 30"):
        presets.load(path, MODEL)
    content = json.loads(path.read_text())
    content["provenance"] = {}
    content["quicksilver"]["halting"]["tau_dift"] = 1.0
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"p\.json: halting\.tau_dift is unknown"):
        presets.load(path, DEEP)
    del content["quicksilver"]["halting"]["tau_dift"]
    content["quicksilver"]["amq"]["execution"] = "auto"  # of older versions
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"amq\.execution must be 'fake' or 'int8', got 'auto'"):
        presets.load(path, DEEP)


def halting(**fields):
    return QuickSilverConfig(halting=HaltingConfig(**fields))


QUOTA = {"rule": "quota", "layers": (2,), "quota": (0.5,), "entropy": None}
MINMAX = AMQConfig(2, normalization="minmax", tau_low=0.3, tau_high=0.6, group=8)
REFUSED = {
    "light_share is of light layers": lambda: HaltingConfig(light_share=0.5),
    "tau_low.*above": lambda: AMQConfig(2, tau_low=3.0, tau_high=1.0),
    "halting.tau_drift must be a number, got nan": lambda: HaltingConfig(tau_drift=float("nan")),
    "halting.drift must be 'raw', 'relative' or 'cosine'": lambda: HaltingConfig(drift="L2"),
    "rising layer numbers": lambda: HaltingConfig(layers=(3, 2)),
    "needs halting.layers": lambda: HaltingConfig(rule="quota"),
    "rising shares": lambda: HaltingConfig(rule="quota", layers=(1, 2), quota=(0.5, 0.2)),
    "is for rule 'quota'": lambda: HaltingConfig(quota=(0.5,)),
    "go together": lambda: HaltingConfig(forced_ids=(3,)),
    "needs kv_skip.tau_kv": lambda: KVSkipConfig("attended"),
    "no effect under 'skip'": lambda: KVSkipConfig("skip", tau_kv=0.1),
    "writes every key": lambda: KVSkipConfig("propagate", delay=1),
    "tau_attn and a fusion.window": lambda: FusionConfig(window=3),
    "positive before fusion.first_layer": lambda: FusionConfig(tau_fuse=(0.1,) * 6, first_layer=3),
    "must be infinite": lambda: AMQConfig(2, entropy=None),
    "no largest value": lambda: AMQConfig(2, entropy="variance", normalization="log_vocab"),
    "amq.targets must be one or more names": lambda: AMQConfig(2, targets=()),
    "power of two": lambda: AMQConfig(2, group=12, rotate=True),
    "symmetric and rotated": lambda: AMQConfig(2, execution="int8", symmetric=False),
    "rotate=False": lambda: AMQConfig(2, execution="int8", rotate=False),
    "is for amq.targets": lambda: AMQConfig(2, targets=("hidden",), execution="int8"),
    "switch halting on": lambda: QuickSilverConfig(kv_skip=KVSkipConfig()),
    "freeze=False does nothing": lambda: halting(freeze=False),
    "name the few": lambda: QuickSilverConfig(
        halting=HaltingConfig(), kv_skip=KVSkipConfig("extrapolate")
    ),
    "needs shortlist_layer": lambda: halting(entropy="shortlist"),
    "final_prev runs token by token": lambda: QuickSilverConfig(
        amq=AMQConfig(2, entropy="final_prev", normalization="minmax", allow_noncausal=True)
    ),
    "end of halting.window is layer 6": lambda: Config(MODEL, halting(window=(2, 6))),
    "leaves no layer": lambda: Config(MODEL, halting(window=(1, 3), min_layer=4)),
    "outside the window": lambda: Config(MODEL, halting(window=(2, 4), layers=(1,))),
    "fusion.first_layer is layer 0": lambda: Config(
        MODEL, QuickSilverConfig(fusion=FusionConfig(first_layer=0))
    ),
    "comes before fusion.first_layer": lambda: Config(
        MODEL, QuickSilverConfig(fusion=FusionConfig(first_layer=4, last_layer=2))
    ),
    "has 2 entries for 6 layers": lambda: Config(MODEL, halting(tau_drift=(1.0, 2.0))),
    "does not divide": lambda: Config(MODEL, QuickSilverConfig(amq=AMQConfig(2, group=5))),
    "amq.layer is layer 9": lambda: Config(MODEL, QuickSilverConfig(amq=AMQConfig(9, group=8))),
    "outside the vocabulary": lambda: Config(
        MODEL, QuickSilverConfig(fusion=FusionConfig(), protect_ids=(97,))
    ),
    "before shortlist_layer": lambda: Config(
        MODEL,
        QuickSilverConfig(
            halting=HaltingConfig(entropy="shortlist"), shortlist_layer=3, shortlist_size=4
        ),
    ),
    "ranks a whole prompt": lambda: Config(MODEL, halting(**QUOTA), protocol="teacher-forced"),
    "looks at later tokens": lambda: Config(
        MODEL, QuickSilverConfig(amq=MINMAX), protocol="teacher-forced"
    ),
    "a prompt, which runs in one pass": lambda: Config(
        MODEL, halting(entropy="final_prev"), protocol="continuation"
    ),
    "protocol must be 'teacher-forced' or": lambda: Config(MODEL, protocol="prefill"),
    "protect_ids must be a valid tuple, got 5": lambda: QuickSilverConfig(protect_ids=5),
    "protect_ids.0 must be a valid integer, got 3.9": lambda: QuickSilverConfig(protect_ids=(3.9,)),
    "halting.forced_ids.0 must be a valid integer": lambda: HaltingConfig(forced_ids=[None]),
    "sink_tokens must be a valid integer, got 4.7": lambda: QuickSilverConfig(sink_tokens=4.7),
    "recent_tokens must be a valid integer, got '3'": lambda: QuickSilverConfig(recent_tokens="3"),
    "min_layer must be a valid integer": lambda: HaltingConfig(min_layer=None),
    "min_layer must be at least 1": lambda: HaltingConfig(min_layer=0),
    "amq.layer must be a valid integer": lambda: AMQConfig(layer=None),
    "halting.quota must be a valid tuple": lambda: HaltingConfig(quota=0.5),
    "halting.freeze must be a valid boolean": lambda: HaltingConfig(freeze="no"),
    "kv_skip.tau_kv must be less than 1": lambda: KVSkipConfig("attended", tau_kv=7),
    "halting must be .* an instance of HaltingConfig": lambda: QuickSilverConfig(halting=True),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_contradictions_are_refused_with_the_reason(reason):
    with pytest.raises(ConfigError, match=reason):
        REFUSED[reason]()


def test_numpy_numbers_are_accepted():
    assert HaltingConfig(tau_drift=np.ones(6)).tau_drift == (1.0,) * 6
    halts = HaltingConfig(tau_halt=np.float32(0.5), window=[1, np.int64(3)], freeze=np.bool_(True))
    assert halts == HaltingConfig(tau_halt=0.5, window=(1, 3))
    assert AMQConfig(2, targets="kv").targets == ("kv",)


def test_the_protocol_follows_what_the_mechanisms_can_do():
    dual, quota = Config(MODEL, halting()), Config(MODEL, halting(**QUOTA))
    assert dual.effective_protocol == "teacher-forced"
    assert quota.effective_protocol == "continuation"
    assert Config(MODEL, QuickSilverConfig(amq=MINMAX)).effective_protocol == "continuation"
    assert Config(MODEL).effective_protocol == "teacher-forced"
    # It is worked out anew when the mechanisms are replaced, unless it was named.
    assert quota.replace(quicksilver=halting()) == dual
    assert dual.replace(quicksilver=halting(**QUOTA)) == quota
    named = Config(MODEL, halting(**QUOTA), protocol="continuation")
    assert named.replace(quicksilver=halting()).effective_protocol == "continuation"
