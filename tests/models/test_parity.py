"""A ladder of comparisons with Hugging Face in torch: embedding, norm, attention, block, logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.config import Config
from qs_jax.engine import dense
from qs_jax.engine.score import score
from qs_jax.models import family_of, layers
from tests.support import CASES, make_pair, random_tokens

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.hf

RUNG_NAMES = ("embed", "norm", "attention", "block")
# Hugging Face submodules of the first layer, in ladder order.
RUNGS = {
    False: ("transformer.drop", "transformer.h.0.ln_1", "transformer.h.0.attn", "transformer.h.0"),
    True: (
        "model.embed_tokens",
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn",
        "model.layers.0",
    ),
}


FEW = ("gpt2", "gpt2-untied", "llama-gqa", "llama-biases", "rope-llama3", "rope-yarn")
FEW += ("mistral-window", "qwen2", "qwen3-biases")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in FEW)) for name in CASES],
)
def pair(request, tmp_path_factory):
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tokens_BT(pair):
    return random_tokens(pair.model)


@pytest.fixture(scope="module")
def theirs(pair, tokens_BT):
    """What each rung of the Hugging Face model puts out, and its logits."""
    seen = {}

    def keep(name):
        def hook(_module, _args, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).numpy()

        return hook

    for rung, path in zip(RUNG_NAMES, RUNGS[family_of(pair.model).rotates], strict=True):
        pair.hf.get_submodule(path).register_forward_hook(keep(rung))
    with torch.no_grad():
        seen["logits"] = pair.hf(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    return seen


def first_block(pair, method, *args):
    params_0 = {name: _first(leaf) for name, leaf in pair.params["layers"].items()}
    block = family_of(pair.model).block(pair.model)
    return block.apply({"params": params_0}, *args, method=method)


def _first(tree):
    return {name: leaf[0] for name, leaf in tree.items()}


def positions(tokens_BT):
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)


def test_embedding(pair, tokens_BT, theirs):
    embed = family_of(pair.model).embed(pair.model)
    ours = embed.apply(
        {"params": pair.params["embed"]}, jnp.asarray(tokens_BT), positions(tokens_BT)
    )
    np.testing.assert_allclose(ours, theirs["embed"], atol=1e-6)


def test_norm(pair, theirs):
    def norm(block, h):
        return layers.normed(block.attn_norm, h, pair.model)

    ours = first_block(pair, norm, jnp.asarray(theirs["embed"]))
    np.testing.assert_allclose(ours, theirs["norm"], atol=1e-5)


def test_attention(pair, tokens_BT, theirs):
    def attention(block, x_BTD):
        q, k, v = block.project(x_BTD, positions(tokens_BT))
        context_BTNH, _ = dense.attend_causal(pair.model)(q, k, v)
        return block.out(context_BTNH.reshape(*x_BTD.shape[:2], -1))

    ours = first_block(pair, attention, jnp.asarray(theirs["norm"]))
    np.testing.assert_allclose(ours, theirs["attention"], atol=1e-5)


def test_block(pair, tokens_BT, theirs):
    def block(block, h_BTD):
        return block(h_BTD, positions(tokens_BT), dense.attend_causal(pair.model))[0]

    ours = first_block(pair, block, jnp.asarray(theirs["embed"]))
    np.testing.assert_allclose(ours, theirs["block"], atol=2e-5)


def test_logits(pair, tokens_BT, theirs):
    assert 5 < np.abs(theirs["logits"]).max() < 100, "the comparison is about logits of order 10"
    out = score(pair.params, tokens_BT, Config(pair.model), return_logits=True)
    np.testing.assert_allclose(out.logits, theirs["logits"], atol=1e-4)


def test_logprobs(pair, tokens_BT, theirs):
    logprobs = torch.log_softmax(torch.tensor(theirs["logits"][:, :-1]), -1)
    expected = torch.gather(logprobs, -1, torch.tensor(tokens_BT[:, 1:, None]).long())[..., 0]
    out = score(pair.params, tokens_BT, Config(pair.model))
    np.testing.assert_allclose(out.logprobs[:, 1:], expected.numpy(), atol=1e-4)
    assert not out.mask[:, 0].any()
    assert out.mask[:, 1:].all()
