"""Laws of dense generation: decode equals score, rows and batches do not mix, no future leaks."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.config import Config
from qs_jax.engine import attention, dense, fast
from qs_jax.engine import score as scoring
from qs_jax.engine.inputs import bucket_size
from qs_jax.errors import ConfigError, InputError, NonFiniteError
from qs_jax.models import head
from qs_jax.testing import tiny_model, tiny_params
from tests.engine.contract import MATRIX, model_of, params_of
from tests.support import random_tokens

MODELS = {
    "gpt2": tiny_model("gpt2"),
    "llama": tiny_model("llama"),
    "llama-mqa": tiny_model("llama", num_kv_heads=1),
}
SAMPLED = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 7}
RAGGED = [[5, 9, 11], list(range(2, 30)), [8], list(range(40, 57))]


# The others are compared with Hugging Face, here and in tests/models.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "llama")) for name in MODELS],
)
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def params(model):
    return tiny_params(model)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_decoding_with_the_cache_equals_scoring_the_whole(model, params, sampling):
    out = qs_jax.generate(params, RAGGED, Config(model, max_new_tokens=20, **sampling))
    scores = qs_jax.score(params, out.sequences, Config(model))
    for row, (start, count) in enumerate(zip(out.prompt_lengths, out.lengths, strict=True)):
        scored = scores.logprobs[row, start : start + count]
        np.testing.assert_allclose(scored, out.logprobs[row, :count], atol=1e-4)


def test_greedy_takes_the_most_likely_token(model, params):
    out = qs_jax.generate(params, RAGGED, Config(model, max_new_tokens=12))
    logits = qs_jax.score(params, out.sequences, Config(model), return_logits=True).logits
    for row, start in enumerate(out.prompt_lengths):
        best = logits[row, start - 1 : start + 11].argmax(-1)
        np.testing.assert_array_equal(out.tokens[row], best)


@pytest.mark.hf
@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_greedy_equals_hugging_face_generate(kind, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.support import make_pair

    pair = make_pair("gpt2" if kind == "gpt2" else "llama-gqa", tmp_path)
    tokens_BT = random_tokens(pair.model, width=12)
    theirs = pair.hf.generate(
        torch.tensor(tokens_BT, dtype=torch.long),
        attention_mask=torch.ones(tokens_BT.shape, dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        repetition_penalty=1.3,
        pad_token_id=0,
    ).numpy()[:, 12:]
    cfg = Config(pair.model, max_new_tokens=24, repetition_penalty=1.3)
    out = qs_jax.generate(pair.params, tokens_BT, cfg)
    np.testing.assert_array_equal(out.tokens[:, : theirs.shape[1]], theirs)


@pytest.mark.parametrize(
    "sampling", [pytest.param({}, marks=pytest.mark.slow), SAMPLED], ids=["greedy", "sampled"]
)
def test_streaming_gives_the_tokens_of_generate(model, params, sampling):
    cfg = Config(model, max_new_tokens=15, eos_token_ids=(3, 17, 40, 50), **sampling)
    out = qs_jax.generate(params, RAGGED, cfg)
    steps = list(qs_jax.stream(params, RAGGED, cfg))
    assert len(steps) == out.lengths.max()
    tokens_BM = np.stack([step.tokens for step in steps], 1)
    np.testing.assert_array_equal(tokens_BM, out.tokens[:, : len(steps)])
    np.testing.assert_array_equal(np.sum([step.is_new for step in steps], 0), out.lengths)
    logprobs_BM = np.stack([step.logprobs for step in steps], 1)
    np.testing.assert_allclose(logprobs_BM, out.logprobs[:, : len(steps)], atol=1e-5)


@pytest.mark.parametrize(
    "sampling", [pytest.param({}, marks=pytest.mark.slow), SAMPLED], ids=["greedy", "sampled"]
)
def test_a_row_does_not_depend_on_its_batch_mates(model, params, sampling):
    """The same rows 0 and 1, with different mates of different lengths behind them."""
    cfg = Config(model, max_new_tokens=10, **sampling)
    mates = [RAGGED[:2], RAGGED, [*RAGGED[:2], [3] * 60, [4] * 9]]
    outs = [qs_jax.generate(params, rows, cfg) for rows in mates]
    for out in outs[1:]:
        np.testing.assert_array_equal(out.tokens[:2], outs[0].tokens)
        np.testing.assert_allclose(out.logprobs[:2], outs[0].logprobs, atol=1e-5)


def test_a_row_does_not_depend_on_padding(model, params):
    cfg = Config(model, max_new_tokens=10)
    alone = qs_jax.generate(params, [RAGGED[0]], cfg)
    width = 40
    right, left = np.full((1, width), 50), np.full((1, width), 51)
    right[0, :3], left[0, -3:] = RAGGED[0], RAGGED[0]
    padded = qs_jax.generate(params, right, cfg, lengths=[3])
    mask = np.arange(width)[None] >= width - 3
    flipped = qs_jax.generate(params, left, cfg, attention_mask=mask)
    for out in (padded, flipped):
        np.testing.assert_array_equal(out.tokens, alone.tokens)
        np.testing.assert_allclose(out.logprobs, alone.logprobs, atol=1e-5)
    scores = [
        qs_jax.score(params, [RAGGED[1]], Config(model)).logprobs[0],
        qs_jax.score(params, [*RAGGED, [7] * 100], Config(model)).logprobs[1, :28],
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_end_tokens_end_their_own_row_only(model, params):
    free = qs_jax.generate(params, RAGGED, Config(model, max_new_tokens=16, eos_token_ids=()))
    assert (free.lengths == 16).all()
    stop = int(free.tokens[1, 4])
    cfg = Config(model, max_new_tokens=16, eos_token_ids=(stop,))
    out = qs_jax.generate(params, RAGGED, cfg)
    for row in range(len(RAGGED)):
        hits = np.flatnonzero(free.tokens[row] == stop)
        count = hits[0] + 1 if hits.size else 16
        assert out.lengths[row] == count
        np.testing.assert_array_equal(out.tokens[row, :count], free.tokens[row, :count])
        assert (out.tokens[row, count:] == 0).all()
        assert (out.logprobs[row, count:] == 0).all()
        assert out.sequences[row] == RAGGED[row] + free.tokens[row, :count].tolist()


def test_the_last_position_can_be_used(model, params):
    prompt = random_tokens(model, batch=1, width=120)
    cfg = Config(model, max_new_tokens=8)
    out = qs_jax.generate(params, prompt, cfg)
    scores = qs_jax.score(params, out.sequences, cfg)
    np.testing.assert_allclose(scores.logprobs[0, 120:], out.logprobs[0], atol=1e-4)
    for call in (qs_jax.generate, qs_jax.stream):
        with pytest.raises(InputError, match="120 prompt tokens \\+ 9 new tokens exceed"):
            call(params, prompt, cfg.replace(max_new_tokens=9))
    with pytest.raises(InputError, match="129 prompt tokens exceed"):
        qs_jax.score(params, random_tokens(model, width=129), cfg)


def retrace_scoring(monkeypatch, function=scoring.score_dense):
    """Let changed constants act: a program of its own."""
    static = ("model", "count", "returns")
    program = jax.jit(lambda *a, **k: function(*a, **k), static_argnames=static)
    monkeypatch.setattr(scoring, "_jit_dense", program)


def test_long_rows_attend_block_by_block(model, params, monkeypatch):
    """Blocks of queries give what one block gives, and still no future leaks."""
    tokens_BT, cfg = random_tokens(model, width=112), Config(model)
    whole = qs_jax.score(params, tokens_BT, cfg, return_logits=True).logits
    monkeypatch.setattr(attention, "QUERY_BLOCK", 24)
    retrace_scoring(monkeypatch)
    blocks = qs_jax.score(params, tokens_BT, cfg, return_logits=True).logits
    np.testing.assert_allclose(blocks, whole, atol=1e-4)
    tokens_BT[:, 50] = (tokens_BT[:, 50] + 1) % model.vocab_size
    after = qs_jax.score(params, tokens_BT, cfg, return_logits=True).logits
    np.testing.assert_array_equal(after[:, :50], blocks[:, :50])
    assert (after[:, 50] != blocks[:, 50]).any()


def test_parameters_of_another_model_are_refused(model, params):
    other = Config(model.replace(num_layers=4))
    for call in (qs_jax.generate, qs_jax.stream, qs_jax.score):
        with pytest.raises(ConfigError, match=r"attn_norm/\w+ is float32\[3, 32\], .*\[4, 32\]"):
            call(params, [[1, 2]], other)
    untied, tied_params = tiny_model("gpt2", tie_embeddings=False), tiny_params(tiny_model("gpt2"))
    with pytest.raises(ConfigError, match="head/tokens is absent"):
        qs_jax.score(tied_params, [[1, 2]], Config(untied))


def test_nothing_scored_is_not_a_perplexity_of_one(model, params):
    assert np.isnan(qs_jax.score(params, [[1]], Config(model)).perplexity)


def test_not_a_number_is_reported_not_returned(model, params):
    broken = jax.tree.map(lambda leaf: leaf, params)
    broken["layers"]["down"]["kernel"] = broken["layers"]["down"]["kernel"].at[1, 0, 0].set(jnp.nan)
    cfg = Config(model, max_new_tokens=4)
    with pytest.raises(NonFiniteError, match=r"row\(s\) \[0\]"):
        qs_jax.generate(broken, [[1, 2, 3]], cfg)
    with pytest.raises(NonFiniteError):
        list(qs_jax.stream(broken, [[1, 2, 3]], cfg))
    with pytest.raises(NonFiniteError):
        qs_jax.score(broken, [[1, 2, 3]], cfg)


def test_prompts_of_one_bucket_share_one_program():
    """Lengths, budgets, seeds and all sampling numbers vary; one program a bucket."""
    model = tiny_model(mlp_size=40)  # no other test's
    params, cfg, sizes = tiny_params(model), Config(model, **SAMPLED), []
    for width, budget in ((1, 1), (9, 16), (16, 13), (17, 13)):
        varied = cfg.replace(
            max_new_tokens=budget,
            seed=width,
            temperature=0.5 + width,
            top_p=0.9,
            top_k=17 + width % 9,
        )
        next(qs_jax.stream(params, random_tokens(model, width=width), varied))
        sizes.append(fast.jit_start._cache_size())
    assert np.diff(sizes).tolist() == [0, 0, 1]


def test_scores_of_one_bucket_share_one_program(monkeypatch):
    model = tiny_model()
    params = tiny_params(model)
    chex.clear_trace_counter()
    retrace_scoring(monkeypatch, chex.assert_max_traces(scoring.score_dense, n=3))
    widths = range(1, 25)
    assert len({bucket_size(width) for width in widths}) == 3
    for width in widths:
        qs_jax.score(params, random_tokens(model, width=width), Config(model))


def test_long_rows_are_scored_in_chunks_of_the_head(monkeypatch):
    """The chunk of positions whose logits exist at a time does not change the result."""
    model = tiny_model()
    params, tokens_BT = tiny_params(model), random_tokens(model, width=100)
    whole = qs_jax.score(params, tokens_BT, Config(model)).logprobs
    monkeypatch.setattr(head, "HEAD_ELEMENTS", 24 * 2 * 97)
    retrace_scoring(monkeypatch)
    chunked = qs_jax.score(params, tokens_BT, Config(model)).logprobs
    np.testing.assert_allclose(chunked, whole, atol=1e-5)
    assert np.abs(whole[:, 1:]).min() > 0


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_bfloat16_runs_and_stays_near_float32(model_type):
    model = tiny_model(model_type)
    half = model.replace(dtype="bfloat16")
    params = tiny_params(model)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    upcast = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    tokens_BT = random_tokens(model)
    ours = qs_jax.score(rounded, tokens_BT, Config(half), return_logits=True).logits
    exact = qs_jax.score(upcast, tokens_BT, Config(model), return_logits=True).logits
    assert ours.dtype == np.float32
    spread = exact.std()
    assert 0 < np.abs(ours - exact).max() < 0.15 * spread
    out = qs_jax.generate(rounded, tokens_BT, Config(half, max_new_tokens=8))
    assert (out.lengths >= 1).all()


def operands_of_products(jaxpr):
    """Dtypes of what a program multiplies, its loops included; `cpu.unfused` asks for precision."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.params["precision"] is None:
            found |= {str(operand.aval.dtype) for operand in equation.invars}
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= operands_of_products(inner)
    return found


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_norms_softmax_and_logits_are_float32_in_a_bfloat16_model(model_type):
    """Read off the program: exp is softmax, rsqrt is norms, the widest product is the head."""
    model = tiny_model(model_type, dtype="bfloat16")
    params = tiny_params(model)
    program = jax.make_jaxpr(lambda *a: head.logits(a[0], dense.forward(*a, model)))(
        params, jnp.ones((2, 16), int)
    )
    text = str(program)
    for operation in ("exp", "rsqrt"):
        results = re.findall(rf":(\w+)\[[^]]*\] = {operation} ", text)
        assert results, f"the program has an {operation}"
        assert set(results) == {"f32"}
    assert re.search(r":f32\[2,16,97\] = dot_general", text)
    assert operands_of_products(program.jaxpr) == {"bfloat16"}, "the layers compute in bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HKFQ", "quota"])
def test_mechanisms_run_in_bfloat16(name):
    half = model_of("llama", dtype="bfloat16")
    params = params_of(half)
    tokens_BT = random_tokens(half, width=24)
    cfg = Config(half, MATRIX[name], max_new_tokens=6, continuation_tokens=6)
    scores = qs_jax.score(params, tokens_BT, cfg, return_logits=True)
    assert scores.logits.dtype == np.float32
    assert not scores.record.active.all()
    out = qs_jax.generate(params, tokens_BT, cfg)
    assert (out.lengths >= 1).all()
    assert not out.record.active.all()
