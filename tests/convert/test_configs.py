"""Published configs are read; what changes the computation, or is out of range, is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import hf_to_flax
from convert.errors import Problems
from convert.hf_attributes import ALIASES, HARMLESS, HARMLESS_AT, READ, REFUSED, ROPE, WINDOW
from convert.hf_config import model_config
from qs_jax.config import Config, ModelConfig, RopeScaling, Sampling
from qs_jax.engine.sampling import filter_logits, penalize, plan_of
from qs_jax.errors import ConfigError
from qs_jax.models.rope import inverse_frequencies
from qs_jax.testing import tiny_model
from tests.convert.folders import LLAMA_CONFIG, refused, write_folder
from tests.support import GPT2, hf_model

BASES = {"llama": LLAMA_CONFIG, "gpt2": GPT2 | {"model_type": "gpt2"}}
BASES |= {kind: LLAMA_CONFIG | {"model_type": kind} for kind in ("mistral", "qwen2", "qwen3")}


def read(kind, more, generation=None, ignored=()):
    """The configuration, what is wrong with it, and the notes."""
    problems = Problems()
    raw = {name: value for name, value in (BASES[kind] | more).items() if value is not ...}
    model, notes = model_config(raw, "float32", problems, generation or {}, ignored)
    return model, " ".join(each for details in problems.values() for each in details), notes


PUBLISHED = {
    "gpt2-medium": ("gpt2", {"n_special": 0, "predict_special_tokens": True, "n_ctx": 1024}),
    "gpt2-xl": ("gpt2", {"output_past": True, "n_inner": None, "task_specific_params": {"a": 1}}),
    "distilgpt2": ("gpt2", {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "_name_or_path": "x"}),
    "DialoGPT": ("gpt2", {"task_specific_params": {"conversational": {"max_length": 1000}}}),
    "Cerebras-GPT": ("gpt2", {"scale_attn_weights": True, "n_inner": 128, "use_cache": True}),
    "uer": ("gpt2", {"gradient_checkpointing": False, "tokenizer_class": "BertTokenizer"}),
    "rinna": ("gpt2", {"bad_words_ids": None, "reorder_and_upcast_attn": False}),
    "flax": ("gpt2", {"use_scan": False, "tie_encoder_decoder": False, "xla_device": None}),
    "aliases": (
        "gpt2",
        {"n_embd": ..., "n_layer": ..., "hidden_size": 32, "num_hidden_layers": 3},
    ),
    "llama-2": ("llama", {"pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16"}),
    "llama-3-instruct": ("llama", {"eos_token_id": [1, 5], "mlp_bias": False, "head_dim": None}),
    "vicuna": ("llama", {"max_sequence_length": 2048, "pad_token_id": 0}),
    "OpenLLaMA": ("llama", {"fcm_max_ratio": 0.0, "remat_block": "", "scan_mlp": False}),
    "SmolLM2": (
        "llama",
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"a": 1}},
    ),
    "default RoPE": ("llama", {"rope_scaling": {"type": "default", "factor": 1.0}}),
    "unsloth": ("llama", {"unsloth_fixed": True, "unsloth_version": "2024.9"}),
    "granite": ("llama", {"embedding_multiplier": 1.0, "logits_scaling": 1.0}),
    "qwen": ("llama", {"sliding_window": 32768, "use_sliding_window": False}),
    "layers": ("llama", {"layer_types": ["full_attention"] * 3, "sliding_window": None}),
    "adapters": ("llama", {"adapters": {}, "neftune_noise_alpha": 5, "attn_implementation": "x"}),
    "null": ("llama", {"nobody_knows": None, "quantization_config": None}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_attributes_that_change_nothing(name):
    kind, more = PUBLISHED[name]
    model, problems, notes = read(kind, more)
    assert not problems
    assert model is not None
    plain = read(kind, {"n_inner": more.get("n_inner")} if kind == "gpt2" else {})[0]
    assert model == plain.replace(
        eos_token_ids=model.eos_token_ids, pad_token_id=model.pad_token_id
    )
    assert notes == []


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"sliding_window": 4096}),
        ("llama", {"sliding_window": 4096, "use_sliding_window": True}),
        ("llama", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("llama", {"embedding_multiplier": 12.0}),
        ("llama", {"logits_scaling": 8.0}),
        ("llama", {"num_local_experts": 8}),
        ("llama", {"transformers_weights": "other.safetensors"}),
        ("llama", {"rms_norm": False}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"add_cross_attention": True}),
        ("gpt2", {"mup": True}),
        ("gpt2", {"rms_norm": True}),
    ],
)
def test_attributes_that_matter_cannot_be_ignored(kind, more):
    name = next(iter(more))
    assert f"{name} = " in read(kind, more)[1]
    assert "is not implemented" in read(kind, more)[1]
    assert f"--ignore-config {name}: only an unknown" in read(kind, more, ignored=[name])[1]


QWEN_SLIDES = {"use_sliding_window": True, "sliding_window": 9}


@pytest.mark.parametrize(
    ("kind", "more", "window"),
    [
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 9}, 9),
        ("qwen2", {"sliding_window": 9}, None),
        ("qwen2", QWEN_SLIDES | {"max_window_layers": 3}, None),
        ("qwen2", QWEN_SLIDES | {"max_window_layers": 0}, 9),
        ("qwen3", QWEN_SLIDES | {"layer_types": ["sliding_attention"] * 3}, 9),
        ("qwen3", QWEN_SLIDES | {"sliding_window": None}, None),
    ],
)
def test_sliding_windows(kind, more, window):
    model, problems, _ = read(kind, more)
    assert not problems
    assert model is not None
    assert model.sliding_window == window


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("qwen2", QWEN_SLIDES | {"max_window_layers": 2}, "layers of different kinds"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "no window is in use"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layers of different kinds"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "are not implemented"),
        ("qwen2", QWEN_SLIDES | {"layer_types": [8, 8, 8]}, "layer_types"),
        ("qwen2", {"eos_token_id": ["8"]}, "eos_token_id"),
        ("mistral", {"sliding_window": 0}, "at least 1"),
        ("mistral", {"sliding_window": "9"}, "must be int"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ("mistral", {"attention_bias": True}, "attention_bias = True is not implemented"),
        ("qwen2", {"attention_bias": False}, "attention_bias = False is not implemented"),
        ("qwen3", {"qk_norm": False}, "qk_norm = False is not implemented"),
    ],
)
def test_relatives_of_llama_that_differ_more(kind, more, message):
    assert message in read(kind, more)[1]


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "mixtral", "phi3", "opt", "t5"])
def test_other_families_are_refused_with_the_reason_and_the_list(kind):
    problems = Problems()
    assert model_config({"model_type": kind}, "float32", problems, {})[0] is None
    (message,) = problems["config attributes"]
    reason = f": {REFUSED[kind]}" if kind != "t5" else ""
    assert message == (
        f"model_type {kind!r} is not supported{reason} (known: gpt2, llama, mistral, qwen2, qwen3)"
    )


def test_aliases_that_disagree():
    assert "hidden_size and n_embd disagree" in read("gpt2", {"hidden_size": 64})[1]


def test_an_unknown_attribute_can_be_ignored_by_name(tmp_path, tensors, capsys):
    config = LLAMA_CONFIG | {"foo": {"a": 1}, "bar": 2}
    source = write_folder(tmp_path / "hf", tensors, config)
    command = ["--source", str(source), "--out", str(tmp_path / "out"), "--quiet"]
    assert hf_to_flax.main(command) == 1
    assert "--ignore-config foo if it changes nothing" in capsys.readouterr().err
    assert hf_to_flax.main([*command, "--ignore-config", "foo", "--ignore-config", "bar"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    notes = ["foo = {'a': 1} is ignored, as asked", "bar = 2 is ignored, as asked"]
    assert err.splitlines() == [f"note: {note}" for note in notes]
    assert json.loads((tmp_path / "out" / "qs_jax.json").read_text())["notes"] == notes
    for name in ("hidden_size", "baz", "use_cache"):
        message = refused(source, tmp_path / "second", ignore_config=("foo", "bar", name))
        assert f"--ignore-config {name}: only an unknown attribute can be ignored" in message


def test_no_attribute_is_in_two_tables():
    for kind, read_here in READ.items():
        tables = [set(HARMLESS), set(HARMLESS_AT[kind]), set(ALIASES.get(kind, ()))]
        tables += [set(read_here) - HARMLESS, set(ROPE) if kind != "gpt2" else set()]
        tables += [set(WINDOW.get(kind, ())) - HARMLESS]
        assert len(set().union(*tables)) == sum(map(len, tables))


SAMPLED = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05}
GENERATION = {
    "sampled": {"do_sample": True, "repetition_penalty": 1.3, **SAMPLED},
    "nothing said": {"do_sample": True},
    "no filter": {"do_sample": True, "top_k": 0, "temperature": 2.5},
    "greedy": {"repetition_penalty": 1.3, **SAMPLED},
    "nothing": {},
}


@pytest.mark.hf
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("name", GENERATION)
def test_generation_defaults_are_those_of_hugging_face(tmp_path, name, file):
    """Probabilities of the next token, as `transformers` reads the same folder."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    hf_model("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    raw = json.loads((tmp_path / "config.json").read_text())
    given = GENERATION[name] | (raw if file == "config.json" else {})
    (tmp_path / file).write_text(json.dumps(given))
    hf, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[5, 6, 7, 6]])
    asked = {"max_new_tokens": 1, "pad_token_id": 0, "return_dict_in_generate": True}
    theirs = hf.generate(ids, **asked, output_scores=True, output_logits=True)

    generation = given if file == "generation_config.json" else {}
    model, problems, notes = read("llama", raw if generation else given, generation)
    assert not problems
    assert bool(notes) == (name == "nothing said")
    plan, numbers = plan_of(Config(model), 1)
    assert plan.greedy != bool(given.get("do_sample"))
    logits_BV = jnp.asarray(theirs.logits[0].numpy())
    if plan.penalize:
        logits_BV = penalize(
            logits_BV, jnp.isin(jnp.arange(97), ids.numpy())[None], numbers.repetition_penalty
        )
    ours = logits_BV if plan.greedy else filter_logits(logits_BV, plan, numbers)
    expected = torch.softmax(theirs.scores[0], -1).numpy()
    np.testing.assert_allclose(jax.nn.softmax(ours), expected, atol=1e-5)


def test_generation_settings_that_are_not_done_are_noted():
    wrong = {"num_beams": 4, "no_repeat_ngram_size": 3, "bad_words_ids": [[4]], "min_length": 2}
    idle = {"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": [], "stop_strings": None}
    idle |= {"typical_p": 0.5, "max_length": 20, "nobody_knows": 1, "length_penalty": 2.0}
    plain, _, notes = read("llama", {}, idle)
    assert notes == []
    model, problems, notes = read("llama", {}, idle | wrong)
    assert (model, problems) == (plain, "")
    expected = [f"{name} = {value!r} is not implemented" for name, value in wrong.items()]
    assert all(any(each in note for note in notes) for each in expected)
    assert len(notes) == len(wrong)
    sampled = {"do_sample": True, "top_k": -3, "top_p": 0.9, "typical_p": 0.5}
    model, problems, notes = read("llama", {}, sampled)
    assert (model.generation, problems) == (Sampling(temperature=1.0, top_p=0.9), "")
    first, second = notes
    assert "sampling.top_k must be at least 0, got -3" in first
    assert "typical_p = 0.5 is not implemented" in second


WRONG = [0, -1, 2**31, 10**400, 1.5, float("nan"), float("inf"), True, "8", [8], {}]
# What Hugging Face itself takes, at some of these values.
FINE = {
    "rope_theta": (2**31, 1.5),
    "rms_norm_eps": (),
    "factor": (1.5,),
    "attention_factor": (1.5,),
    "mscale": (0, 1.5),
    "beta_fast": (0, 1.5),
    "beta_slow": (0, 1.5),
    "original_max_position_embeddings": (),
}
SIZES = [name for name, (_, types, _) in READ["llama"].items() if types[0] is int]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", [*SIZES, "rms_norm_eps", "rope_theta", "head_dim"])
def test_numbers_out_of_range_are_refused(name, kind):
    for value in WRONG:
        if value not in FINE.get(name, ()) or value is True:
            model, problems, _ = read(kind, {name: value})
            assert problems, f"{name} = {value!r}"
            assert model is None or name == "rope_theta"


@pytest.mark.parametrize("name", [name for name in FINE if not name.startswith("r")])
def test_numbers_of_a_scaling_out_of_range_are_refused(name):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    for value in WRONG:
        problems = read("llama", {"rope_scaling": yarn | {name: value}})[1]
        fine = value in FINE[name] and value is not True
        assert bool(problems) != fine, f"{name} = {value!r}: {problems}"


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [True, 1.0, "1", [[1]], {}, [1.0], [True]])
def test_ids_that_are_no_ids(name, value):
    for problems in (read("llama", {name: value})[1], read("llama", {}, {name: value})[1]):
        assert f"{name} = {value!r} must be int" in problems


@pytest.mark.parametrize("value", [["llama"], {}, 5])
def test_names_that_are_no_names(value):
    assert "is not supported" in read("llama", {"model_type": value})[1]
    assert "must be str" in read("llama", {"hidden_act": value})[1]
    rope = {"rope_scaling": {"rope_type": value, "factor": 2.0}}
    assert "must be str" in read("llama", rope)[1]


@pytest.mark.hf
@pytest.mark.parametrize("unset", [{"beta_fast": 0, "beta_slow": 0}, {"beta_slow": None}, {}])
def test_a_beta_of_zero_is_the_default(unset):
    """As transformers computes the frequencies."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32} | unset
    sizes = {name: value for name, value in LLAMA_CONFIG.items() if name != "rope_theta"}
    config = LlamaConfig(**sizes, rope_parameters=rope | {"rope_theta": 1e4})
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    model, problems, _ = read("llama", {"rope_scaling": rope})
    assert not problems
    assert model is not None
    freqs, ours = inverse_frequencies(model)
    np.testing.assert_allclose(freqs, expected.numpy(), rtol=1e-6)
    assert ours == pytest.approx(factor)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 0, "x", None, [1]])
def test_settings_of_a_model_are_checked_where_they_are_made(value):
    for name in ("hidden_size", "num_layers", "norm_eps", "max_positions"):
        with pytest.raises(ConfigError, match=name):
            ModelConfig.from_dict(tiny_model().to_dict() | {name: value})
    for name in ("factor", "beta_fast", "rope_type"):
        fields = {"rope_type": "linear", "factor": 2.0, name: value}
        with pytest.raises(ConfigError):
            RopeScaling(**fields)
    if value not in (0, None):
        with pytest.raises(ConfigError, match="temperature"):
            Config(tiny_model(), temperature=value)
