"""The embedded real model: SmolLM2-135M-Instruct."""

import numpy as np
import pytest

import qs_jax
from convert import flax_to_hf
from qs_jax.text import encode_prompt

pytestmark = pytest.mark.xdist_group("embedded")


@pytest.fixture(scope="module")
def loaded(embedded_checkpoint):
    params, model = qs_jax.load(embedded_checkpoint)
    return params, model, qs_jax.load_tokenizer(embedded_checkpoint)


def test_it_has_its_shape_and_knows_the_capital_of_france(loaded):
    params, model, tokenizer = loaded
    shape = (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads)
    assert shape == (30, 576, 9, 3)
    assert (model.mlp_size, model.vocab_size, model.max_positions) == (1536, 49152, 8192)
    assert model.tie_embeddings
    assert len(tokenizer) == 49152
    ids = tokenizer("The capital of France is").input_ids
    out = qs_jax.generate(params, [ids], qs_jax.Config(model=model, max_new_tokens=1))
    assert "Paris" in tokenizer.decode(out.tokens[0])


@pytest.mark.slow
def test_it_answers_in_its_chat_template(loaded):
    params, model, tokenizer = loaded
    ids = encode_prompt(tokenizer, "What is the capital of France?", chat=True)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    out = qs_jax.generate(params, [ids], qs_jax.Config(model=model, max_new_tokens=32))
    assert "Paris" in tokenizer.decode(out.tokens[0])
    assert out.tokens[0, out.lengths[0] - 1] == model.eos_token_ids[0], "it ends by itself"


@pytest.mark.slow
def test_drafts_change_no_token_in_float32(embedded_checkpoint):
    """One row, and rows that keep different counts."""
    params, model = qs_jax.load(embedded_checkpoint, dtype="float32")
    tokenizer = qs_jax.load_tokenizer(embedded_checkpoint)
    asked = (
        "Repeat this word for word: The miller opens three gates, and the wheel begins to turn.",
        "Why is the sky blue?",
    )
    rows = [encode_prompt(tokenizer, text, chat=True) for text in asked]
    for sampling in ({}, {"temperature": 0.7, "top_p": 0.9, "seed": 1}):
        cfg = qs_jax.Config(model, max_new_tokens=40, **sampling)
        for prompts in (rows[:1], rows):
            plain = qs_jax.generate(params, prompts, cfg)
            cfg_drafts = cfg.replace(speculate=qs_jax.Speculation(gate=0))
            drafted = qs_jax.generate(params, prompts, cfg_drafts)
            np.testing.assert_array_equal(drafted.tokens, plain.tokens)
            np.testing.assert_allclose(drafted.logprobs, plain.logprobs, atol=1e-3)
        assert drafted.accepted.any()


@pytest.mark.slow
def test_codes_of_the_file_are_its_weights(embedded_checkpoint):
    floats, model = qs_jax.load(embedded_checkpoint, dtype="float32")
    coded, _ = qs_jax.load(embedded_checkpoint, dtype="float32", weights="gguf")
    tokens = np.random.default_rng(0).integers(5, 40000, (1, 64))
    ours, theirs = (
        qs_jax.score(params, tokens, qs_jax.Config(model), return_logits=True).logits
        for params in (coded, floats)
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


@pytest.mark.slow
@pytest.mark.hf
def test_perplexity_equals_hugging_face_on_the_same_weights(
    embedded_checkpoint, research_data, tmp_path
):
    """First 8 windows of 512 tokens of WikiText validation, float32, within 1 %."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    params, model = qs_jax.load(embedded_checkpoint, dtype="float32")
    text = (research_data / "wikitext" / "wiki.valid.raw").read_text(encoding="utf-8")
    ids = qs_jax.load_tokenizer(embedded_checkpoint)(text, verbose=False).input_ids
    rows = np.array(ids[: 8 * 512]).reshape(8, 512)
    ours = qs_jax.score(params, rows, qs_jax.Config(model=model)).perplexity
    exported = flax_to_hf.export(embedded_checkpoint, tmp_path / "hf")
    hf = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        losses = [hf(row[None], labels=row[None]).loss for row in torch.tensor(rows)]
    theirs = float(torch.stack(losses).mean().exp())
    assert abs(ours / theirs - 1) < 0.01
    assert 20 < theirs < 23
