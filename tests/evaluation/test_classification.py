"""Classification by heads: numbers against NumPy, torch and SciPy."""

import json

import jax
import jaxtyping
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from safetensors.numpy import save_file

import qs_jax
from convert.errors import ConversionError
from convert.hf_to_flax import convert
from qs_jax import accounting
from qs_jax.config import Config
from qs_jax.errors import CheckpointError, InputError, NonFiniteError
from qs_jax.evaluation.classification import last_states, with_head
from qs_jax.evaluation.heads import Head, fit_head
from qs_jax.testing import tiny_model, tiny_params
from tests.evaluation.settings import dual, quota
from tests.evaluation.test_tasks import TOY
from tests.support import GPT2, LLAMA

pytestmark = pytest.mark.xdist_group("classification")
# In one bucket of the engine: each program is made once. Seven rows are no full batches.
LENGTHS = (17, 16, 17, 16, 16, 17, 16)
QUOTA = quota()
SETTINGS = {"dense": (None, None), "dual": (dual(), "teacher-forced"), "quota": (QUOTA, None)}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", bos_token_id=0, eos_token_ids=(1,))


@pytest.fixture(scope="module")
def params(model):
    return tiny_params(model)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 97, length).tolist() for length in LENGTHS]


def config(model, name):
    quicksilver, protocol = SETTINGS[name]
    return Config(model, quicksilver, protocol=protocol, engine="masked")


@pytest.mark.parametrize("name", SETTINGS)
def test_states_are_those_of_each_row_alone(params, model, prompts, name):
    """Whatever the lengths of its batch mates; the mechanisms see the prompt as a whole."""
    cfg = config(model, name)
    states, counts = last_states(params, cfg, prompts, batch_size=4)
    ends = [len(prompts[0])] if cfg.effective_protocol == "continuation" else None
    row = [*prompts[0], 0]
    alone = qs_jax.score(params, [row], cfg, prompt_lengths=ends, return_states=True)
    np.testing.assert_allclose(states[0], alone.states[0, len(prompts[0]) - 1], atol=1e-4)
    assert counts["prefill"]["tokens"] == sum(LENGTHS)
    assert counts["prefill"]["readouts"] == len(prompts)
    assert counts["decode"]["tokens"] == 0


def hf_classifier(kind, folder, **changes):
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    sizes = (GPT2 if kind == "gpt2" else LLAMA) | {"num_labels": 3, "pad_token_id": 0} | changes
    config = AutoConfig.for_model(kind, **sizes)
    hf = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for tensor in hf.parameters():
            tensor.add_(0.2 * torch.randn_like(tensor))
    hf.eval().save_pretrained(folder)
    return hf


@pytest.mark.hf
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"num_labels": 2, "id2label": {0: "neg", 1: "pos"}}),
        pytest.param("llama", {}, marks=pytest.mark.slow),
    ],
)
def test_hugging_face_sequence_classifiers(tmp_path, prompts, kind, changes):
    """Converted backbone and head give torch's logits, on rows of different lengths."""
    torch = pytest.importorskip("torch")
    hf = hf_classifier(kind, tmp_path / "hf", **changes)
    model, _ = convert(str(tmp_path / "hf"), tmp_path / "ours", tokenizer=False, classifier=True)
    params, loaded = qs_jax.load(tmp_path / "ours")
    assert loaded == model
    stored = Head.load(tmp_path / "ours")
    assert stored.labels == tuple(hf.config.id2label.values())
    ours = stored.logits(last_states(params, config(model, "dense"), prompts)[0])
    for prompt, row in zip(prompts, ours, strict=True):
        with torch.no_grad():
            theirs = hf(torch.tensor([prompt])).logits[0].numpy()
        np.testing.assert_allclose(row, theirs, atol=1e-4)
    assert np.abs(ours).max() > 0.5


def test_a_head_on_states_under_the_mechanisms(params, model, prompts):
    rng = np.random.default_rng(1)
    head = Head(rng.normal(size=(2, 32)).astype(np.float32), np.float32([0, 1]), ("a", "b"))
    dense, halted = (
        with_head(params, config(model, name), prompts, head, batch_size=4)
        for name in ("dense", "quota")
    )
    assert np.abs(dense.scores_EC - halted.scores_EC).max() > 1e-2
    # Projections and attention of two layers; in the third, keys and values of every token and the
    # rest of the last; and two classes: no vocabulary.
    linear, key = accounting.flops.linear_flops(model), accounting.flops.key_flops(model)
    keys = sum(n * (n + 1) // 2 for n in LENGTHS) * key
    last = sum((n - 1) * 2 * 32 * 2 * model.kv_size + linear + n * key for n in LENGTHS)
    expected = 2 * (linear * sum(LENGTHS) + keys) + last + len(LENGTHS) * 2 * 32 * 2
    assert dense.counts["prefill"]["exact_flops"] == expected
    assert halted.counts["prefill"]["exact_flops_dense"] == expected
    assert halted.counts["prefill"]["exact_flops"] < expected
    # Half of the eligible tokens of each prompt stop after layer 1 of 3.
    stopped = sum((n - QUOTA.recent_tokens) // 2 for n in LENGTHS)
    saved = accounting.summary(halted.counts)["layer_tokens_saved"]
    assert saved == pytest.approx(2 * stopped / (3 * sum(LENGTHS)))


@pytest.mark.hf
def test_classifiers_that_cannot_be_converted(tmp_path):
    pytest.importorskip("torch")
    from safetensors.numpy import load_file

    hf_classifier("llama", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)

    def refused(changed):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ConversionError) as caught:
            convert(str(tmp_path / "hf"), tmp_path / "out", tokenizer=False, classifier=True)
        assert not (tmp_path / "out").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["hf"], "nothing may be left behind"
        return str(caught.value)

    score = tensors.pop("score.weight")
    assert "has no score.weight" in refused(tensors)
    for changed, message in (
        (np.ones((3, 4), np.float32), "score.weight: [3, 4], expected [3, 32]"),
        (score * np.nan, "NaN or infinite"),
        (score.astype(np.int8), "score.weight: I8 is not implemented"),
        (np.ones((4, 32), np.float32), "the head has 4 classes"),
    ):
        assert message in refused(tensors | {"score.weight": changed})


def test_heads_fit_the_classes_of_a_task(tmp_path):
    weight, bias = np.arange(6, dtype=np.float32).reshape(2, 3), np.float32([1, 2])
    numbered = Head(weight, bias, ("LABEL_0", "LABEL_1"))
    np.testing.assert_array_equal(numbered.for_task(TOY).weight_CD, weight)
    turned = Head(weight, bias, ("True", "False")).for_task(TOY)
    np.testing.assert_array_equal(turned.weight_CD, weight[::-1])
    assert turned.bias_C.tolist() == [2, 1]
    with pytest.raises(InputError, match="the head's classes are yes, no; toy has false, true"):
        Head(weight, bias, ("yes", "no")).for_task(TOY)
    with pytest.raises(CheckpointError, match=r"has no classifier\.safetensors"):
        Head.load(tmp_path)
    stored = Head.load(numbered.save(tmp_path).parent)
    np.testing.assert_array_equal(stored.weight_CD, weight)
    (tmp_path / "classifier.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="is damaged"):
        Head.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": np.ones((2, 3), np.int32)}, "the weight of the head is int32"),
        ({"weight": np.ones((2, 3))}, r"is float64\[2, 3\], expected float32\[2, width\]"),
        ({"weight": np.ones(2, np.float32)}, r"is float32\[2\], expected"),
        ({"weight": np.ones((3, 3), np.float32)}, r"is float32\[3, 3\], expected"),
        ({"bias": np.ones((2, 1), np.float32)}, "the bias of the head is"),
        ({"bias": np.ones(3, np.float32)}, r"expected float32\[2\]"),
        ({"bias": np.float32([0, np.nan])}, "the bias of the head holds NaN or infinity"),
        ({"weight": np.full((2, 3), np.inf, np.float32)}, "the weight of the head holds NaN"),
        ({"labels": ["a", "a"]}, "a name of its own for each class"),
        ({"labels": ["a", "b", "c"]}, r"expected float32\[3, width\]"),
        ({"labels": []}, "a name of its own for each class"),
        ({"labels": [0, 1]}, "a name of its own for each class"),
        ({"labels": "ab"}, "its labels are 'ab', expected a list"),
    ],
)
def test_heads_that_are_damaged(tmp_path, monkeypatch, changes, message):
    """Read without this suite's checks of types, as by users."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, np.float32)}
    given |= {"labels": ["a", "b"]} | changes
    about = json.dumps({"labels": given.pop("labels"), "backbone": None})
    save_file(given, tmp_path / "classifier.safetensors", metadata={"head": about})
    with pytest.raises((CheckpointError, NonFiniteError), match=message) as caught:
        Head.load(tmp_path)
    assert "classifier.safetensors" in str(caught.value)


def test_scores_of_a_head_are_finite_or_refused(params, model, prompts):
    """Products beyond float32 rank as in float64; states that are not finite name their row."""
    weight = np.float32([[3e38, 3e38], [3e38, 2e38]])
    head, states = (
        Head(weight, np.zeros(2, np.float32), ("a", "b")),
        np.float32([[3e38, 1], [9, 9]]),
    )
    scores = head.logits(states)
    np.testing.assert_allclose(scores, np.float64(states) @ np.float64(weight).T)
    assert scores.argmax(1).tolist() == [0, 0]
    for bad in (np.nan, np.inf):
        states[1, 0] = bad
        with pytest.raises(NonFiniteError, match=r"row\(s\) \[1\]"):
            head.logits(states)
        with pytest.raises(NonFiniteError, match=r"row\(s\) \[1\]"):
            fit_head(states, np.array([0, 1]), ("a", "b"), l2=0.1)
    with pytest.raises(InputError, match="reads states of width 2, this model's have 32"):
        with_head(params, config(model, "dense"), prompts, head)
    broken = params | {"embed": {"tokens": params["embed"]["tokens"].at[5].set(jax.numpy.nan)}}
    with pytest.raises(NonFiniteError, match=r"in the batch of rows \[1, 0\], .* row\(s\) \[0\]"):
        last_states(broken, config(model, "dense"), [[7] * 17, [5] * 18, [7] * 16], batch_size=2)


def test_a_fitted_head_is_the_minimum():
    """SciPy, in float64, on the same loss."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    x = (rng.normal(size=(60, 5)) * [1, 2, 3, 40, 0] + y[:, None]).astype(np.float32)
    x[:, 4] = 7  # a channel that never varies
    head, info = fit_head(x, y, ("a", "b", "c"), l2=0.05)
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)

    def loss(flat):
        weight, bias = flat[:15].reshape(3, 5), flat[15:]
        logprobs = scipy.special.log_softmax(z @ weight.T + bias, axis=1)
        return -logprobs[np.arange(60), y].mean() + 0.025 * (weight**2).sum()

    best = scipy.optimize.minimize(loss, np.zeros(18), method="BFGS")
    assert info["loss"] == pytest.approx(best.fun, abs=1e-5)
    assert info["iterations"] < 500
    logits = z @ best.x[:15].reshape(3, 5).T + best.x[15:]
    ours = head.logits(x)
    np.testing.assert_allclose(
        scipy.special.softmax(ours, axis=1), scipy.special.softmax(logits, axis=1), atol=2e-3
    )
    with pytest.raises(InputError, match="no training row is d"):
        fit_head(x, y, ("a", "b", "c", "d"), l2=0.05)
    for l2 in (-1.0, np.nan):
        with pytest.raises(InputError, match="--l2"):
            fit_head(x, y, ("a", "b", "c"), l2=l2)


def test_states_are_what_the_head_reads(params, model, prompts):
    """The states times the head's table are the logits."""
    cfg, ends = config(model, "quota"), [14] * 4
    options = {"return_logits": True, "return_states": True}
    out = qs_jax.score(params, prompts[:4], cfg, prompt_lengths=ends, **options)
    table = np.asarray(params["head"]["tokens"])
    for states, logits, length in zip(out.states, out.logits, LENGTHS, strict=False):
        np.testing.assert_allclose(states[:length] @ table.T, logits[:length], atol=1e-3)
