"""The GPU command in tiny form on CPU, what becomes of failures, and programs of a 7B model."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import models, sections
from benchmarks.gpu.rows import NO_TIME, tables
from qs_jax.engine import fast, weights
from qs_jax.errors import InputError
from qs_jax.mechanisms import light
from qs_jax.models import abstract_params, cpu
from tests.engine.programs import arguments_of


def run(folder, checkpoint, *options):
    out = folder / "out.json"
    gpu.main(["--out", str(out), "--ckpt", str(checkpoint), "--tiny", *options])
    content = json.loads(out.read_text())
    assert content["finished"]
    return content


def no_torch():
    raise InputError("torch is not installed.")


@pytest.fixture(scope="module")
def content(tiny_checkpoint, tmp_path_factory):
    """Every section, of parity float32 only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "DTYPES", ("float32",))
        patch.setattr(sections, "_require_torch", no_torch)
        return run(tmp_path_factory.mktemp("gpu"), tiny_checkpoint)


def test_every_section_has_rows(content):
    assert list(content["sections"]) == list(gpu.SECTIONS)
    reasons = {
        name: row["reason"]
        for found in content["sections"].values()
        for name, row in found.items()
        if "reason" in row
    }
    assert set(reasons) == {"embedded 2x64 cudnn", "llama-7b 2x64 cudnn", "2x64 HF sdpa bfloat16"}
    assert reasons["2x64 HF sdpa bfloat16"] == "torch is not installed."


def test_another_device_gives_the_same_numbers(content):
    """Of the tests' four CPU devices the first is compared with the last."""
    found = content["sections"]["parity"]
    assert {row["device"] != row["reference"] for row in found.values()} == {True}
    assert found["dense float32"]["max_difference"] == 0
    assert found["dense float32"]["mean_kl"] == 0
    assert found["dense float32"]["same_likeliest_token"] == 1
    assert found["balanced float32"]["equal_decisions"] == 1
    assert found["balanced float32"]["layer_tokens_saved"] > 0


@pytest.mark.parametrize("section", ["embedded", "llama-7b"])
def test_calls_are_timed_in_turn_with_the_dense_one(content, section):
    found = content["sections"][section]
    for name, row in found.items():
        assert row["prefill_seconds"] > 0, name
        assert row["seconds"] > 0, name
        assert row["baseline"] == "dense"
        assert len(row["runs"]["seconds"]) >= models.TINY.rounds
        assert (row["batch"], row["prompt_tokens"], row["new_tokens"]) == (2, 64, 8)
    kinds = {name: row["mechanism"] and row["mechanism"]["kind"] for name, row in found.items()}
    expected = {"2x64 dense": None, "2x64 balanced": "quota", "2x64 fast-answers": "quota"}
    if section == "llama-7b":
        expected["2x64 light"] = "light layers"
    assert kinds == expected


def test_attention_and_scopes(content):
    found = content["sections"]["attention"]
    assert found["embedded 2x64 library"]["seconds"] > 0
    assert found["embedded 2x64 xla"]["seconds"] > 0
    assert 0 <= found["llama-7b 2x64 xla"]["max_difference"] < 0.1
    (traced,) = content["sections"]["trace"].values()
    assert {"attn", "mlp", "head"} <= set(traced["seconds_by_scope"])


def test_the_tables_show_rows_and_reasons(content):
    shown = tables(content)
    assert set(shown.values()).isdisjoint({"not measured"})
    assert shown["gpu llama-7b"].count("\n| 2x64") == 4
    assert "RuntimeError: cuDNN is not detected." in shown["gpu attention"]
    assert "torch is not installed." in shown["gpu torch"]
    assert all(table.count("\n") <= 13 for table in shown.values())


def test_without_time_every_row_says_so(content, tiny_checkpoint, tmp_path):
    found = run(tmp_path, tiny_checkpoint, "--max-minutes", "0")["sections"]
    whole = {name: list(rows) for name, rows in content["sections"].items()}
    both = [f"{name} {dtype}" for name in ("dense", "balanced") for dtype in sections.DTYPES]
    assert {name: list(rows) for name, rows in found.items()} == whole | {"parity": both}
    assert {row["reason"] for rows in found.values() for row in rows.values()} == {NO_TIME}


def test_a_failure_is_a_reason_and_the_next_row_goes_on(tiny_checkpoint, tmp_path, monkeypatch):
    """A section that raises; one whose library call runs out of memory; a number JSON has not."""

    def fail(*_, **__):
        raise RuntimeError("it broke\nmore of it")

    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    def compare(*_):
        return {"mean_kl": float("nan")}

    monkeypatch.setitem(gpu.SECTIONS, "trace", fail)
    monkeypatch.setattr(sections, "blocked_attention", full)
    monkeypatch.setattr(sections, "_compare_logits", compare)
    monkeypatch.setattr(sections, "DTYPES", ("float32",))
    chosen = ["--sections", "trace", "attention", "parity"]
    found = run(tmp_path, tiny_checkpoint, *chosen)["sections"]
    assert found["trace"]["section"]["reason"] == "RuntimeError: it broke"
    attention = found["attention"]
    assert attention["embedded 2x64 library"]["reason"].startswith("out of memory (RESOURCE_")
    assert attention["embedded 2x64 xla"]["baseline"] == "xla"
    assert "not JSON compliant" in found["parity"]["dense float32"]["reason"]
    assert found["parity"]["balanced float32"]["equal_decisions"] == 1


def test_an_unknown_section_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"unknown sections \['speed'\]; known: parity"):
        gpu.main(["--out", str(tmp_path / "out.json"), "--sections", "speed"])


# --- programs of a GPU --------------------------------------------------------------------------


@pytest.fixture
def seven(monkeypatch):
    """Parameters of the 7B model, which are shapes only, and its calls, traced as on a GPU."""
    monkeypatch.setattr(cpu, "on_cpu", lambda: False)
    monkeypatch.setattr(models, "_noise", lambda _, *leaf: jax.ShapeDtypeStruct(*leaf))
    once = types.SimpleNamespace(get=lambda _, make: make())
    monkeypatch.setattr(weights, "_last", once)
    monkeypatch.setattr(weights, "bind", abstract_bind)
    model = models.LLAMA_7B
    calls = models.large(model, 64).calls
    maps = models.random_maps(model, calls["light"].quicksilver)
    return abstract_params(model) | {"kv_maps": maps}, calls


def abstract_bind(params, maps, model):
    return jax.eval_shape(lambda *arrays: light.bind(*arrays, model), params, maps)


@pytest.mark.parametrize("name", ["dense", "balanced", "light"])
def test_the_prefill_of_a_7b_model_lowers_for_cuda(seven, name):
    params, calls = seven
    tokens = np.ones((8, 8192), np.int32)
    call = functools.partial(qs_jax.generate, params, tokens, calls[name])
    assert "bf16" in lowered(*arguments_of(call, "fast", "jit_start"))


def test_drafting_with_a_7b_model_lowers_for_cuda(seven, monkeypatch):
    """The loop over new tokens; what the prefill would give are zeros of its shapes."""
    params, calls = seven

    def start(*arrays, **static):
        shapes = jax.eval_shape(functools.partial(fast.start, **static), *arrays)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    monkeypatch.setattr(fast, "jit_start", start)
    tokens = np.ones((1, 32), np.int32)
    call = functools.partial(qs_jax.generate, params, tokens, calls["fast-answers"])
    text = lowered(*arguments_of(call, "decode", "jit_run_until"))
    assert "stablehlo.while" in text
    assert "bf16" in text


def lowered(program, arrays, static):
    return program.trace(*arrays, **static).lower(lowering_platforms=("cuda",)).as_text()


def test_random_parameters_are_those_of_the_model():
    """Norms are ones; layers differ."""
    model = models.TINY.large
    made, expected = models.random_params(model), abstract_params(model)
    signature = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == signature
    assert (made["final_norm"]["norm"]["scale"] == 1).all()
    kernel = np.asarray(made["layers"]["qkv"]["kernel"], np.float32)
    assert kernel.std() == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(kernel[0], kernel[1])


def test_prompts_repeat_and_differ_by_row():
    rows = models.repeated(np.arange(100, dtype=np.int32), 3, 250, vocab_size=90)
    assert rows.shape == (3, 250)
    assert rows.max() < 90
    assert np.array_equal(rows[:, :100], rows[:, 100:200])
    assert rows[0, 0] != rows[1, 0] != rows[2, 0]


@pytest.mark.slow
@pytest.mark.hf
def test_torch_is_timed_in_turn(tiny_checkpoint, tmp_path):
    found = run(tmp_path, tiny_checkpoint, "--sections", "torch", "parity")["sections"]
    timed = found["torch"]["2x64 HF sdpa bfloat16"]
    assert timed["baseline"] == "dense"
    assert timed["seconds"] > 0
    assert len(found["parity"]) == 4
