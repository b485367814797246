"""Classification by label words and by heads: numbers against NumPy, torch and SciPy."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from qs_jax.evaluation.prompts import Prompts

import qs_jax
from convert.classifier import convert_classifier
from convert.errors import ConversionError
from qs_jax import accounting
from qs_jax.config import Config, HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.errors import CheckpointError, InputError
from qs_jax.evaluation import classification
from qs_jax.evaluation.classification import Runner, task_results, word_loglikelihoods, zero_shot
from qs_jax.evaluation.heads import Head, fit_head
from qs_jax.testing import tiny_model, tiny_params, toy_tokenizer
from tests.evaluation.test_tasks import TOY
from tests.support import GPT2, LLAMA

# With words of up to three tokens in one bucket of the engine: each program is made once. Seven
# rows are no full batches.
LENGTHS = (17, 16, 17, 16, 16, 17, 16)
DUAL = QuickSilverConfig(
    halting=HaltingConfig(entropy=None, tau_drift=3.5, window=None),
    kv_skip=KVSkipConfig("skip"),
    recent_tokens=2,
)
QUOTA = QuickSilverConfig(
    halting=HaltingConfig(rule="quota", layers=(1,), quota=(0.5,), entropy=None),
    kv_skip=KVSkipConfig("skip"),
    sink_tokens=0,
    recent_tokens=2,
)
SETTINGS = {"dense": (None, None), "dual": (DUAL, "teacher-forced"), "quota": (QUOTA, None)}


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


def runner_of(params, model, name, **options):
    return Runner(params, config(model, name), batch_size=4, **options)


@pytest.mark.parametrize("name", SETTINGS)
def test_word_likelihoods_are_those_of_the_logits(params, model, prompts, name):
    """Row by row, from logits, whatever the lengths of prompts and words."""
    words = ([5, 6, 7], [8], [9, 10])
    found, counts = word_loglikelihoods(runner_of(params, model, name), prompts, words)
    cfg = config(model, name)
    for prompt, row in zip(prompts[:3], found[:3], strict=True):
        for word, value in zip(words, row, strict=True):
            ends = [len(prompt)] if cfg.effective_protocol == "continuation" else None
            out = qs_jax.score(
                params, [prompt + word], cfg, prompt_lengths=ends, return_logits=True
            )
            logprobs = scipy.special.log_softmax(out.logits[0].astype(np.float64), axis=-1)
            steps = range(len(prompt), len(prompt) + len(word))
            expected = sum(logprobs[i - 1, (prompt + word)[i]] for i in steps)
            assert value == pytest.approx(expected, abs=1e-4)
    assert counts["prefill"]["tokens"] == 3 * sum(LENGTHS)
    assert counts["decode"]["tokens"] == len(LENGTHS) * 6


@pytest.mark.parametrize("name", SETTINGS)
def test_words_of_one_token_are_read_from_one_run(params, model, prompts, name):
    runner = runner_of(params, model, name)
    words = ([5], [8], [9])
    found, counts = word_loglikelihoods(runner, prompts, words)
    pairs = [(prompt, word) for prompt in prompts for word in words]
    expected, thrice = runner.loglikelihoods(pairs)
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-5)
    assert counts["prefill"]["tokens"] * 3 == thrice["prefill"]["tokens"]
    assert counts["prefill"]["readouts"] == len(prompts)
    assert counts["decode"]["tokens"] == 0


def test_the_mechanisms_act_on_what_is_scored(params, model, prompts):
    """Another threshold gives other numbers; off gives those of the dense model."""

    def likelihoods(quicksilver, protocol):
        cfg = Config(model, quicksilver, protocol=protocol, engine="masked")
        return word_loglikelihoods(Runner(params, cfg, 4), prompts, ([5], [8]))

    def dual(tau):
        return dataclasses.replace(DUAL, halting=dataclasses.replace(DUAL.halting, tau_drift=tau))

    for protocol in ("teacher-forced", "continuation"):
        dense, nothing = likelihoods(None, protocol)
        off, _ = likelihoods(QuickSilverConfig(), protocol)
        np.testing.assert_array_equal(off, dense)
        assert accounting.summary(nothing)["exact_flops_saved"] == 0
        found = [likelihoods(dual(tau), protocol) for tau in (0.0, 3.5, 1e9)]
        np.testing.assert_allclose(found[0][0], dense, atol=1e-5)
        saved = [accounting.summary(counts)["layer_tokens_saved"] for _, counts in found]
        assert 0 == saved[0] < saved[1] < saved[2]
        assert np.abs(found[1][0] - dense).max() > 1e-2
        assert np.abs(found[2][0] - found[1][0]).max() > 1e-2


def test_savings_by_hand(params, model):
    """Half of the eligible tokens of a prompt stop after layer 1 of 3."""
    prompt = list(range(2, 22))
    _, counts = word_loglikelihoods(runner_of(params, model, "quota"), [prompt], ([5], [8]))
    stopped = round(0.5 * (len(prompt) - QUOTA.recent_tokens))
    expected = 2 * stopped / (3 * len(prompt))
    assert accounting.summary(counts)["layer_tokens_saved"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "count", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_any_number_of_devices(params, model, prompts, count):
    """Batches of four and three rows; neither divides by three devices and the last by none."""
    devices = jax.local_devices()[:count]
    assert len(devices) == count
    words = ([5, 6], [8])
    alone, counts = word_loglikelihoods(runner_of(params, model, "quota"), prompts, words)
    runner = runner_of(params, model, "quota", devices=devices)
    found, same = word_loglikelihoods(runner, prompts, words)
    np.testing.assert_allclose(found, alone, atol=1e-5)
    for name in ("layer_tokens", "exact_flops", "kv_written"):
        assert same["prefill"][name] == counts["prefill"][name]


def test_progress_counts_rows(params, model, prompts):
    done = []
    runner = runner_of(params, model, "dense", advance=done.append)
    word_loglikelihoods(runner, prompts, ([5], [8]))
    assert done == [4, 3]


def test_normalizations(params, model, prompts):
    tokenizer = toy_tokenizer()
    task = dataclasses.replace(TOY, words=("a", "bcd"))
    runner = runner_of(params, model, "dense")
    outcome = zero_shot(runner, task, Prompts(tuple(prompts), 0), tokenizer)
    words = [tokenizer(word).input_ids for word in task.words]
    sums, _ = word_loglikelihoods(runner, prompts, words)
    alone, _ = word_loglikelihoods(runner, [tokenizer("?").input_ids], words)
    np.testing.assert_allclose(outcome.scores["sum"], sums)
    np.testing.assert_allclose(outcome.scores["length"], sums / [1, 3])
    np.testing.assert_allclose(outcome.scores["pmi"], sums - alone)
    assert outcome.predicted("sum").tolist() == np.argmax(sums, axis=1).tolist()


def test_results_of_a_task(params, model, prompts):
    tokenizer, labels = toy_tokenizer(), np.array([0, 1, 1, 0, 1, 1, 0])
    task = dataclasses.replace(TOY, metric="matthews")
    dense, other = (
        zero_shot(runner_of(params, model, name), task, Prompts(tuple(prompts), 0), tokenizer)
        for name in ("dense", "quota")
    )
    found = task_results(task, labels, dense, other, "pmi")
    assert found["class_shares"] == {"false": 3 / 7, "true": 4 / 7}
    assert found["dense"]["value"] == found["dense"]["ways"]["pmi"]["value"]
    assert found["difference"]["value"] == pytest.approx(
        found["quicksilver"]["value"] - found["dense"]["value"]
    )
    changed = dense.predicted("pmi") != other.predicted("pmi")
    assert found["difference"]["changed"] == changed.sum()
    assert 0 < found["quicksilver"]["saved"]["exact_flops_saved"] < 1
    np.testing.assert_allclose(found["per_example"]["dense"]["sum"], dense.scores["sum"], atol=1e-6)
    alone = task_results(task, labels, dense, None, "sum")
    assert "quicksilver" not in alone
    assert "difference" not in alone


def hf_classifier(kind, folder, **changes):
    import torch
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
    )

    torch.manual_seed(0)
    changes = {"num_labels": 3, "pad_token_id": 0} | changes
    if kind == "gpt2":
        hf = GPT2ForSequenceClassification(GPT2Config(**(GPT2 | changes)))
    else:
        hf = LlamaForSequenceClassification(LlamaConfig(**(LLAMA | changes)))
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
        pytest.param("gpt2", {}, marks=pytest.mark.slow),
        ("llama", {}),
        pytest.param(
            "llama",
            {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_hugging_face_sequence_classifiers(tmp_path, prompts, kind, changes):
    """Converted backbone and head give torch's logits, on rows of different lengths."""
    torch = pytest.importorskip("torch")
    hf = hf_classifier(kind, tmp_path / "hf", **changes)
    model, head = convert_classifier(tmp_path / "hf", tmp_path / "ours", tokenizer=False)
    params, loaded = qs_jax.load(tmp_path / "ours")
    assert loaded == model
    stored = Head.load(tmp_path / "ours")
    assert stored.labels == head.labels == tuple(hf.config.id2label.values())
    states, counts = runner_of(params, model, "dense").last_states(prompts)
    ours = stored.logits(states)
    for prompt, row in zip(prompts, ours, strict=True):
        with torch.no_grad():
            theirs = hf(torch.tensor([prompt])).logits[0].numpy()
        np.testing.assert_allclose(row, theirs, atol=1e-4)
    assert np.abs(ours).max() > 0.5
    assert counts["decode"]["tokens"] == 0


def test_a_head_on_states_under_the_mechanisms(params, model, prompts):
    rng = np.random.default_rng(1)
    head = Head(rng.normal(size=(2, 32)).astype(np.float32), np.float32([0, 1]), ("a", "b"))
    dense, quota = (
        classification.with_head(runner_of(params, model, name), Prompts(tuple(prompts), 0), head)
        for name in ("dense", "quota")
    )
    assert np.abs(dense.scores["head"] - quota.scores["head"]).max() > 1e-2
    # Projections and attention of every layer, and two classes: no vocabulary.
    linear = accounting.flops.linear_flops(model)
    keys = sum(n * (n + 1) // 2 for n in LENGTHS) * accounting.flops.key_flops(model)
    expected = 3 * (linear * sum(LENGTHS) + keys) + len(LENGTHS) * 2 * 32 * 2
    assert dense.counts["prefill"]["exact_flops"] == expected
    assert quota.counts["prefill"]["exact_flops_dense"] == expected
    assert quota.counts["prefill"]["exact_flops"] < expected


@pytest.mark.hf
def test_classifiers_that_cannot_be_converted(tmp_path):
    pytest.importorskip("torch")
    from safetensors.numpy import load_file, save_file

    hf_classifier("llama", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)

    def refused(changed):
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ConversionError) as caught:
            convert_classifier(tmp_path / "hf", tmp_path / "out", tokenizer=False)
        assert not (tmp_path / "out").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["hf"], "nothing may be left behind"
        return str(caught.value)

    score = tensors["score.weight"]
    assert "has no score.weight" in refused({k: v for k, v in tensors.items() if v is not score})
    assert "score.weight is [3, 4], the model is 32 wide" in refused(
        tensors | {"score.weight": np.ones((3, 4), np.float32)}
    )
    assert "NaN or infinite" in refused(tensors | {"score.weight": score * np.nan})
    assert "the head has 4 classes" in refused(
        tensors | {"score.weight": np.ones((4, 32), np.float32)}
    )
    with pytest.raises(ConversionError, match="is not a folder"):
        convert_classifier(tmp_path / "nothing", tmp_path / "out")


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
    with pytest.raises(InputError, match="--l2"):
        fit_head(x, y, ("a", "b", "c"), l2=-1.0)


@pytest.mark.parametrize("engine", ["masked", "compact"])
def test_states_are_what_the_head_reads(params, model, prompts, engine):
    """For both engines: the states times the head's table are the logits."""
    cfg = Config(model, QUOTA, engine=engine)
    prompts, ends = prompts[:4], [14] * 4
    out = qs_jax.score(
        params, prompts, cfg, prompt_lengths=ends, return_logits=True, return_states=True
    )
    table = np.asarray(params["head"]["tokens"])
    for row, length in enumerate(LENGTHS[:4]):
        np.testing.assert_allclose(
            out.states[row, :length] @ table.T, out.logits[row, :length], atol=1e-3
        )
    assert qs_jax.score(params, prompts, cfg, prompt_lengths=ends).states is None
