"""The harness itself, on task files written here: what it asks, and what `qs-jax` answers."""

import copy
import functools
import json
import os
import subprocess
import sys
import types
from unittest import mock
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
import scipy.special
from tokenizers import Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

import qs_jax
from qs_jax import presets
from qs_jax.config import Sampling
from qs_jax.errors import InputError, NonFiniteError
from tests.evaluation.settings import dual, quota

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'qs-jax[lm-eval]'"
)
pytestmark = [
    pytest.mark.xdist_group("harness"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

DOCUMENTS = [
    {"text": "aab bba", "choices": [" x", " yz"], "label": 0},
    {"text": "abc cba", "choices": [" zz", " y"], "label": 1},
    {"text": "the fox", "choices": [" q", " run"], "label": 1},
]
FILES = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{text}} then:"
doc_to_target: label
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text * 6}}"
metric_list: [{metric: bits_per_byte}]
""",
    "until": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["!"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """A checkpoint, presets, and a folder of tasks with their data."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "ckpt").symlink_to(tiny_checkpoint)
    _, model = qs_jax.load(tiny_checkpoint)
    for name, quicksilver in {"half": quota(), "dual": dual()}.items():
        presets.save(folder / f"{name}.json", quicksilver, model)
    (folder / "tasks").mkdir()
    data = folder / "tasks" / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, content in FILES.items():
        head = f"task: {name}_here\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}/cache}}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(head + content.lstrip())
    return folder


@pytest.fixture(scope="module")
def model_of(folder):
    """A model of the adapter by its preset; each is made once."""
    from qs_jax.evaluation.lm_eval_adapter import QSJaxLM

    @functools.cache
    def model_of(name, **options):
        preset = name if name == "off" else str(folder / f"{name}.json")
        given = {"engine": "masked", "batch_size": 4} | options
        return QSJaxLM(str(folder / "ckpt"), preset, **given)

    return model_of


def evaluate(model, folder, *names):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    tasks = [f"{name}_here" for name in names]
    return lm_eval.simple_evaluate(
        model, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0
    )


@pytest.fixture(scope="module")
def hf_of(tiny_checkpoint):
    """The harness's own `hf` model of the same weights, by torch, with a tokenizer of ours."""
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    absent = "accelerate" not in sys.modules  # it is for several devices, and not asked here
    if absent:
        sys.modules |= {"accelerate": MagicMock(), "accelerate.utils": MagicMock()}
    from lm_eval.models.huggingface import HFLM

    if absent:
        del sys.modules["accelerate"], sys.modules["accelerate.utils"]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint.parent / "hf")

    def hf_of(tokenizer, **options):
        return HFLM(model, tokenizer=copy.deepcopy(tokenizer), device="cpu", **options)

    return hf_of


def template(tokenizer, form):
    """The tokenizer with a template, such as "<s> $A"."""
    made = copy.deepcopy(tokenizer)
    special = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=form, special_tokens=special
    )
    return made


def pieces():
    """A tokenizer that knows small letters, the space, "th", "the" and "()", and drops the rest."""
    known = ["<s>", "</s>", *map(chr, range(97, 123)), " ", "(", ")", "th", "the", "()"]
    merges = [("t", "h"), ("th", "e"), ("(", ")")]
    model = models.BPE(vocab={piece: i for i, piece in enumerate(known)}, merges=merges)
    made = Tokenizer(model)
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def request(*args):
    return types.SimpleNamespace(args=args, task_name=None)


def loglikelihood(lm, pairs):
    return lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)


def logprobs_of(lm, ids, prompt):
    """Log-probabilities of the tokens after `prompt` of them, one row, from logits."""
    cfg = lm.cfg
    ends = [prompt] if cfg.effective_protocol == "continuation" else None
    out = qs_jax.score(lm.params, [ids], cfg, prompt_lengths=ends, return_logits=True)
    logits = out.logits[0].astype(np.float64)
    picked = scipy.special.log_softmax(logits, axis=-1)[np.arange(len(ids) - 1), ids[1:]]
    return picked[prompt - 1 :], logits[prompt - 1 : -1].argmax(-1)


def test_the_harness_runs_every_kind_of_task(model_of, folder):
    lm = model_of("half")
    results = evaluate(lm, folder, "choice", "rolling", "until")
    for name, document in enumerate(DOCUMENTS):
        sample = results["samples"]["choice_here"][name]
        for choice, ((value, _),) in zip(document["choices"], sample["resps"], strict=True):
            context = lm.tok_encode(document["text"] + " then:")
            ids = context + lm.tok_encode(choice)
            expected, _ = logprobs_of(lm, ids, len(context))
            assert float(value) == pytest.approx(expected.sum(), abs=1e-3)
    best = [
        np.argmax([float(response[0][0]) for response in sample["resps"]])
        for sample in results["samples"]["choice_here"]
    ]
    right = np.mean([b == d["label"] for b, d in zip(best, DOCUMENTS, strict=True)])
    assert results["results"]["choice_here"]["acc,none"] == pytest.approx(right)
    assert results["results"]["rolling_here"]["bits_per_byte,none"] > 0
    info = results["config"]["qs_jax"]
    assert info["preset"] == "half.json"
    assert info["protocol"] == "continuation"
    assert 0 < info["saved_scoring"]["layer_tokens_saved"] < 1
    for sample, document in zip(results["samples"]["until_here"], DOCUMENTS, strict=True):
        cfg = lm.cfg.replace(max_new_tokens=12)
        out = qs_jax.generate(lm.params, [lm.tok_encode(document["text"])], cfg)
        whole = lm.tokenizer.decode(out.tokens[0, : out.lengths[0]], skip_special_tokens=True)
        assert sample["resps"][0][0] == whole.split("!")[0]


@pytest.mark.parametrize("name", ["off", "half", pytest.param("dual", marks=pytest.mark.slow)])
def test_words_of_one_token_share_a_row(model_of, name):
    """Their context runs once; every value is that of a row of its own, and greedy is right."""
    lm, asked = model_of(name), [([5, 6, 7, 8, 9], [word]) for word in (3, 4)]
    asked += [([5, 6, 7, 8, 9], [3, 4]), ([6, 7, 8, 9, 9], [3])]
    best = logprobs_of(lm, [*asked[0][0], 3], 5)[1].tolist()
    asked += [(asked[0][0], best)]
    lm.counts = None
    found = lm._loglikelihood_tokens([(None, *pair) for pair in asked], True)
    for (context, after), (value, greedy) in zip(asked, found, strict=True):
        expected, best = logprobs_of(lm, context + after, len(context))
        assert value == pytest.approx(expected.sum(), abs=1e-4)
        assert greedy == (best.tolist() == after)
    assert found[-1][1], "the likeliest word is greedy"
    assert lm.counts["prefill"]["tokens"] == 15  # three rows of five


@pytest.mark.parametrize("name", ["off", "half"])
def test_rolling_predicts_every_token_once(model_of, name):
    lm = model_of(name, max_length=128 if name == "off" else 32)
    text = "abcdefg hijklmn opqrstu vwxyz and so on"
    ids = [lm.prefix_token_id, *lm.tok_encode(text)]
    (found,) = lm.loglikelihood_rolling([request(text)], disable_tqdm=True)
    if name == "off":
        expected = logprobs_of(lm, ids, 1)[0].sum()
    else:  # blocks of 16, each with what fits before it as its prompt
        blocks = [(ids[max(end - 16, 0) : end + 16], min(end, 16)) for end in (1, 17, 33)]
        expected = sum(logprobs_of(lm, row, end)[0].sum() for row, end in blocks)
    assert found == pytest.approx(expected, abs=1e-3)
    assert lm.loglikelihood_rolling([request("")], disable_tqdm=True) == [0.0]


# Blank, empty, special, of every length, and longer than max_length; some of them shared.
CONTEXTS = ["", " ", "  \t", "<s>", "a", "<s>a ", "the fox ", "a context that is too long to fit"]


@pytest.mark.hf
@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        *[("off", 3), ("off", 5)],
        *[pytest.param(*case, marks=pytest.mark.slow) for case in (("off", 2), ("half", 3))],
    ],
)
def test_a_result_is_that_of_the_request_alone_and_of_the_hf_model(
    model_of, hf_of, name, batch_size
):
    lm, rng = (
        model_of(name, batch_size=batch_size, max_length=20),
        np.random.default_rng(batch_size),
    )
    pairs = [(rng.choice(CONTEXTS), "xyzwv"[: rng.integers(1, 5)]) for _ in range(17)]
    pairs += [(" ", "x"), (" ", "y"), ("", "<s>x"), ("", " x")]
    found = loglikelihood(lm, pairs)
    for pair, (value, greedy) in zip(pairs, found, strict=True):
        ((alone, also),) = loglikelihood(model_of(name, batch_size=1, max_length=20), [pair])
        assert (value, greedy) == (pytest.approx(alone, abs=1e-4), also)
    if name == "off":  # its `hf` model refuses blank contexts, and its rows hold a token more
        hf = hf_of(lm.tokenizer, max_length=19)
        pairs = [(a, b) if a.strip() else ("", a + b) for a, b in pairs]
        for ours, theirs in zip(found, loglikelihood(hf, pairs), strict=True):
            assert ours == (pytest.approx(theirs[0], abs=1e-4), theirs[1])


@pytest.mark.parametrize(
    ("form", "context", "after", "tokens"),
    [
        ("$A", "the", "n", ["the", "n"]),
        ("$A", "", "then", ["<s>", "the", "n"]),
        ("$A", " ", "he", ["<s>", " ", "h", "e"]),
        ("$A", "\u2603", "then", ["<s>", "the", "n"]),  # a context that this tokenizer drops
        ("$A", "t", "hen", ["<s>", "the", "n"]),  # all of it belongs to a token of what follows
        ("$A", "at", "hen", ["a", "the", "n"]),
        ("$A", "f(", ")", ["f", "()"]),
        ("$A", "a ", "then", ["a", " ", "the", "n"]),
        ("<s> $A", " ", "the", ["<s>", " ", "the"]),
        ("<s> $A", "t", "he", ["<s>", "the"]),
        ("$A </s>", "a", "b", ["a", "b", "</s>"]),
    ],
)
def test_every_token_of_what_follows_is_scored(model_of, monkeypatch, form, context, after, tokens):
    lm = model_of("off", max_length=128)
    monkeypatch.setattr(lm, "tokenizer", template(pieces(), form))
    ids = lm.tokenizer.convert_tokens_to_ids(tokens)
    ((found, _),) = loglikelihood(lm, [(context, after)])
    assert found == pytest.approx(logprobs_of(lm, ids, 1)[0].sum(), abs=1e-4)
    for pair in ((context.strip(), ""), (context.strip(), "\u2603"), ("", "<s>")):
        with pytest.raises(InputError, match=r"1 to 127 tokens, got 0"):
            loglikelihood(lm, [pair])


@pytest.mark.hf
def test_the_beginning_token_of_a_rolled_text_is_given(model_of, hf_of, monkeypatch):
    lm, whole = model_of("off", max_length=20), "abcdefg hijklmn opqrstu vwxyz and so on"
    monkeypatch.setattr(lm, "tokenizer", template(lm.tokenizer, "<s> $A"))
    for text in (whole, whole[:15], "<s>" + whole[:15]):
        (found,) = lm.loglikelihood_rolling([request(text)], disable_tqdm=True)
        given = hf_of(lm.tokenizer, max_length=19, add_bos_token=False)
        (theirs,) = given.loglikelihood_rolling([request(text.removeprefix("<s>"))], True)
        assert found == pytest.approx(theirs, abs=1e-4)
        if len(text) < 20:
            assert found == pytest.approx(loglikelihood(lm, [("", text)])[0][0], abs=1e-4)
    # By default their `hf` model predicts it as well, after itself (issue 3333 of the harness).
    (theirs,) = hf_of(lm.tokenizer).loglikelihood_rolling([request(text)], True)
    doubled = [0, 0, *lm.tok_encode(text, add_special_tokens=False)[1:]]
    assert theirs == pytest.approx(logprobs_of(lm, doubled, 1)[0].sum(), abs=1e-4)
    assert lm.loglikelihood_rolling([request("<s>")], disable_tqdm=True) == [0.0]


@pytest.mark.parametrize(
    ("scale", "message"),
    [(-1e38, r"of request 2 is -inf"), (1e38, r"in the batch of rows \[0, 1\], logits of row")],
)
def test_likelihoods_that_are_not_finite_are_refused(model_of, monkeypatch, scale, message):
    """Of a word that only shares a row, too: the scored token of the row is another."""
    lm, context = model_of("off", max_length=128), [5, 6, 7]
    out = qs_jax.score(lm.params, [[*context, 3]], lm.cfg, return_states=True)
    table = np.array(lm.params["head"]["tokens"])
    table[4] = scale * np.sign(out.states[0, 2])
    monkeypatch.setattr(lm, "params", lm.params | {"head": {"tokens": jax.numpy.asarray(table)}})
    with pytest.raises(NonFiniteError, match=message):
        lm._loglikelihood_tokens(
            [(None, context, [3]), (None, [5, 5], [5, 6]), (None, context, [4])]
        )


@pytest.mark.hf
def test_generation_from_contexts_of_any_length(model_of, hf_of):
    lm, asked = model_of("off", batch_size=3, max_length=20), {"max_gen_toks": 4, "until": []}
    contexts = ["", " ", *CONTEXTS[-4:]]
    found = lm.generate_until([request(text, asked) for text in contexts], disable_tqdm=True)
    hf = hf_of(lm.tokenizer, max_length=20)
    for text, ours in zip(contexts, found, strict=True):
        (theirs,) = hf.generate_until([request(text or "<s>", asked)], disable_tqdm=True)
        assert ours == theirs


def test_drafts_and_codes_are_options_of_the_model(model_of):
    """Drafts change no text, stop strings included; codes are what `load` gives."""
    asked = [request(text, {"max_gen_toks": 12, "until": []}) for text in ("abab" * 5, "b" * 9)]
    options = {"batch_size": 2, "dtype": "float32", "engine": "auto"}
    plain, drafted = model_of("off", **options), model_of("off", **options, speculate=True)
    whole = plain.generate_until(asked, disable_tqdm=True)
    assert drafted.generate_until(asked, disable_tqdm=True) == whole
    until = [request("abab" * 5, {"max_gen_toks": 12, "until": whole[0][4]})]
    found = drafted.generate_until(until, disable_tqdm=True)
    assert found == [whole[0].partition(whole[0][4])[0]]
    coded = model_of("off", weights="int8")
    assert coded.params["layers"]["qkv"]["kernel"].codes.dtype == np.int8


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, "2x2"])
def test_results_do_not_depend_on_the_devices(model_of, devices):
    """Three requests: neither layout divides them."""
    options = {"batch_size": 3, "dtype": "float32", "engine": "auto"}
    one, more = model_of("half", **options), model_of("half", **options, devices=devices)
    contexts = ["abab" * 5, "b" * 9, "a quick fox " * 3]
    pairs = [(text, " b") for text in contexts]
    for ours, theirs in zip(loglikelihood(more, pairs), loglikelihood(one, pairs), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    asked = [request(text, {"max_gen_toks": 6, "until": []}) for text in contexts]
    texts = [lm.generate_until(asked, disable_tqdm=True) for lm in (one, more)]
    assert texts[0] == texts[1]


def test_requests_fit_the_model(model_of):
    lm = model_of("half", max_length=32)
    before = lm.truncated
    assert lm._fit(list(range(40)), [1, 2]) == (list(range(10, 40)), [1, 2])
    assert lm.truncated == before + 1
    for after in (list(range(32)), []):
        with pytest.raises(InputError, match=f"1 to 31 tokens, got {len(after)}"):
            lm._fit([1], after)
    with pytest.raises(InputError, match="--batch_size must be a number"):
        model_of("off", batch_size="auto")


def test_generation_settings(model_of):
    lm = model_of("off")
    asked = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "top_k": 50, "until": []}
    requests = [request("hello", asked), request("hello", asked)]
    first, second = lm.generate_until(requests, disable_tqdm=True)
    assert first != second, "rows of a batch draw apart"
    assert lm.generate_until(requests, disable_tqdm=True) == [first, second]
    whole = lm.generate_until([request("hello", {"max_gen_toks": 12})], disable_tqdm=True)[0]
    until = request("hello", {"max_gen_toks": 12, "until": whole[5]})
    assert lm.generate_until([until], disable_tqdm=True) == [whole.split(whole[5])[0]]
    for settings, message in (
        ({"num_beams": 4}, r"that qs-jax does not have: .*num_beams"),
        ({"max_gen_toks": 128}, "max_gen_toks must lie between"),
    ):
        with pytest.raises(InputError, match=message):
            lm.generate_until([request("a", settings)], disable_tqdm=True)


def test_what_a_request_does_not_say_is_the_checkpoint_s(model_of):
    """A model that is meant to be sampled is greedy here unless a request samples."""
    lm = model_of("off")
    generation = Sampling(temperature=0.7, top_k=9, min_p=0.1, repetition_penalty=1.2)
    meant = lm.cfg.replace(model=lm.cfg.model.replace(generation=generation))
    samples = {"do_sample": True, "top_k": -1, "top_p": 0.9}
    with mock.patch.object(lm, "cfg", meant):
        asked = [lm._settings({"max_gen_toks": 9} | each) for each in ({}, samples)]
    greedy, sampled = (cfg.sampling for cfg in asked)
    assert greedy == generation.replace(temperature=0)
    assert sampled == generation.replace(top_k=0, top_p=0.9)


def test_a_hugging_face_folder(tiny_checkpoint, model_of, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    off = model_of("off")
    lm = type(off)(str(tiny_checkpoint.parent / "hf"))
    assert lm.folder.is_relative_to(tmp_path)
    assert lm.cfg.model == off.cfg.model
    assert lm.tok_encode("abc") == off.tok_encode("abc")


def test_chat_templates_and_special_tokens(model_of):
    lm = model_of("off")
    with pytest.raises(InputError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "hi"}])
    lm.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert lm.apply_chat_template([{"role": "user", "content": "hi"}]) == "[hi]"
    lm.tokenizer.chat_template = None
    assert lm.prefix_token_id == 0
    assert lm.tok_encode("<s>a") == [0, *lm.tok_encode("a")]


def test_without_the_harness(monkeypatch, capsys):
    from qs_jax import lm_eval as command

    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "qs_jax.evaluation.lm_eval_adapter", raising=False)
    assert command.main() == 1
    assert "pip install 'qs-jax[lm-eval]'" in capsys.readouterr().err


@pytest.mark.slow
def test_from_the_shell(folder, tmp_path):
    command = [sys.executable, "-m", "qs_jax.lm_eval", "run", "--model", "qs-jax"]
    command += ["--model_args", f"ckpt={folder}/ckpt,preset={folder}/half.json,engine=masked"]
    command += ["--tasks", "choice_here", "--include_path", str(folder / "tasks")]
    command += ["--output_path", str(tmp_path / "out"), "--batch_size", "4"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "choice_here" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["qs_jax"]["preset"] == "half.json"
