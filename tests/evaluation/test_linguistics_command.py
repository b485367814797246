"""`python -m qs_jax linguistics` on a tiny model, recounted, and its mistakes."""

import json

import numpy as np
import pytest
import scipy.special
import tyro

import qs_jax
from convert.hf_to_flax import convert
from qs_jax import presets
from qs_jax.commands.linguistics import Linguistics
from qs_jax.config import Config, FusionConfig, HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.errors import InputError
from qs_jax.evaluation.linguistics import read_treebank
from qs_jax.evaluation.linguistics.tags import CATEGORIES
from tests.convert.folders import llama_tensors, write_folder
from tests.evaluation.miniature import WORDS, write_treebank

DT, IN, _, PRP, AUX, CW = CATEGORIES


@pytest.fixture(scope="module")
def treebank(tmp_path_factory):
    return read_treebank(write_treebank(tmp_path_factory.mktemp("treebank")))


WIDTH = 20
MIXED = QuickSilverConfig(
    halting=HaltingConfig(entropy=None, tau_drift=3.5, layers=(1, 2)),
    kv_skip=KVSkipConfig("skip"),
    fusion=FusionConfig(tau_fuse=1.0, distance="relative", first_layer=1),
    sink_tokens=2,
    recent_tokens=4,
)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linguistics")
    convert(str(write_folder(folder / "hf", llama_tensors()[0])), folder / "ckpt")
    return folder / "ckpt"


def run(*flags):
    tyro.cli(Linguistics, args=list(map(str, flags))).run()


@pytest.fixture
def command(ckpt, tmp_path, monkeypatch):
    """Runs the command in a folder with the miniature treebank."""
    path = write_treebank(tmp_path)
    monkeypatch.setattr(
        presets, "by_name", lambda name, model: presets.off(model) if name == "off" else MIXED
    )
    start = ["--ckpt", ckpt, "--seq-len", WIDTH, "--batch-size", 2, "--out", tmp_path / "out.json"]

    def command(*flags):
        given = () if "--treebank" in flags or "--text" in flags else ("--treebank", path)
        run(*start, *([] if "--preset" in flags else ["--preset", "mixed"]), *given, *flags)
        return json.loads((tmp_path / "out.json").read_text())

    return command


def characters(text, name_of):
    """The class of every token, None for spaces: characters, but one for the blank line."""
    found = [None] * len(text.text)
    for word, (start, end) in enumerate(zip(text.starts_W, text.ends_W, strict=True)):
        found[start:end] = [name_of(word)] * (end - start)
    del found[text.text.index("\n\n")]
    return found


def test_the_command_recounted(command, ckpt, treebank, capsys):
    got = command()
    params, model = qs_jax.load(ckpt)
    tokenizer = qs_jax.load_tokenizer(ckpt)
    ids = tokenizer(treebank.text).input_ids
    windows = len(ids) // WIDTH
    assert (len(ids), windows) == (len(treebank.text) - 1, 4)
    rows = np.array(ids[: windows * WIDTH]).reshape(windows, WIDTH)
    cfg = Config(model=model, quicksilver=MIXED)
    out = qs_jax.score(params, rows, cfg, return_logits=True)
    dense = qs_jax.score(params, rows, cfg.replace(quicksilver=None), return_logits=True)
    record = out.record
    content = {tag for tag in set(treebank.tags) if tag[:2] in ("NN", "VB", "JJ", "RB")} - {"VBZ"}
    kinds = characters(treebank, lambda word: treebank.tags[word] in content)
    owners = characters(treebank, lambda word: word)

    hits = count = 0
    for at, kind in enumerate(kinds[: windows * WIDTH]):
        window, column = divmod(at, WIDTH)
        if kind and column >= 2:
            count += 1
            hits += int(record.depth[window, column] < 3)
    row = got["halting"]["paper"][CW]["halted"]
    assert 0 < hits < count
    assert (row["hits"], row["count"]) == (hits, count)

    pairs = [
        (w, t) for w in range(windows) for t in range(WIDTH) if record.representative[w, t] != t
    ]
    assert got["fusion"]["layer 3"]["pairs"] == len(pairs) > 5
    assert got["fusion"]["layer 1"]["pairs"] == int((record.fused[1] != np.arange(WIDTH)).sum())
    words = [(owners[w * WIDTH + t], owners[w * WIDTH + t + 1]) for w, t in pairs]
    assert got["fusion"]["layer 3"]["inside_word"] == sum(a == b is not None for a, b in words)
    assert got["fusion"]["layer 3"]["no_word"] == sum(None in pair for pair in words)
    # Without the two sinks of a window, and the blank line: it is </s> to the toy tokenizer.
    assert rows[2, -1] == 1
    assert got["fusion"]["baseline"]["pairs"] == windows * (WIDTH - 3) - 1

    def outcomes(scored):
        logprobs = scipy.special.log_softmax(scored.logits.astype(np.float64), axis=-1)[:, :-1]
        loss = -np.take_along_axis(logprobs, rows[:, 1:, None], -1)[..., 0]
        return logprobs.argmax(-1) == rows[:, 1:], loss

    (right, loss), (dense_right, dense_loss) = outcomes(out), outcomes(dense)
    chosen = np.array([k is True for k in kinds[: windows * WIDTH]]).reshape(windows, WIDTH)[:, 1:]
    row = got["prediction"]["predicted"]["paper"][CW]
    assert row["tokens"] == chosen.sum()
    assert row["nll_change"] == pytest.approx((loss - dense_loss)[chosen].mean(), abs=1e-4)
    change = right[chosen].mean() - dense_right[chosen].mean()
    assert row["accuracy_change"] == pytest.approx(change, abs=1e-9)
    read = np.array([k is True for k in kinds[: windows * WIDTH]]).reshape(windows, WIDTH)[:, :-1]
    row = got["prediction"]["read"]["paper"][CW]
    assert row["nll_change"] == pytest.approx((loss - dense_loss)[read].mean(), abs=1e-4)

    assert (got["protocol"], got["simulated"]) == ("teacher-forced", True)
    assert got["corpus"]["words_in_corpus"] == len(WORDS)
    assert got["corpus"]["tokens_by_words_touched"]["1"] == sum(
        owner is not None for owner in owners[: windows * WIDTH]
    )
    assert got["nll"] == pytest.approx(out.nll, rel=1e-5)
    assert got["dense_nll"] == pytest.approx(dense.nll, rel=1e-5)
    told = capsys.readouterr()
    for shown in ("Function words", "baseline", "simulated", "wrote"):
        assert shown in told.out
    assert "4/4" in told.err


def test_a_prompt_and_what_follows_it(command, ckpt):
    """Only tokens of the prompt may halt; only those after it are scored."""
    got = command("--protocol", "continuation", "--continuation-tokens", 8, "--limit", 2)
    assert got["tokens_scored"] == 2 * 8
    # 12 tokens of prompt, without 2 sinks, and without the last 4.
    assert got["tokens_open"] == 2 * 6
    assert sum(row["halted"]["count"] for row in got["halting"]["piece"].values()) <= 12
    assert got["fusion"]["baseline"]["pairs"] == 2 * 5
    read = got["prediction"]["read"]["side"].values()
    assert {depth for row in read for depth in row["depth"]} == {"3"}
    assert got["corpus"]["windows"] == 2


MISTAKES = {
    "exists": ([], "Nothing was changed"),
    "both": (["--text", "a.txt", "--treebank", "b.zip"], "either --treebank or --text"),
    "off": (["--preset", "off"], "'off' has no mechanisms"),
    "batch": (["--batch-size", "0"], "--batch-size must be at least 1"),
    "limit": (["--limit", "0"], "at least 1"),
    "treebank": (["--treebank", "nowhere.zip"], "does not exist"),
    "map": (["--text", "a.txt", "--tag-map", "b.map"], "--tag-map is for --treebank"),
    "width": (["--seq-len", "129"], "--seq-len"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_anything_runs(command, tmp_path, name, monkeypatch):
    flags, message = MISTAKES[name]
    monkeypatch.setattr(qs_jax, "load", lambda *args, **options: pytest.fail("loaded"))
    if name == "exists":
        (tmp_path / "out.json").write_text("precious")
    if name == "width":  # a treebank long enough for windows that the model has no room for
        folder = tmp_path / "long"
        folder.mkdir()
        (folder / "a.mrg").write_text("((S (NN dog) (NN cat)))\n" * 40)
        flags = [*flags, "--treebank", str(folder)]
    with pytest.raises(InputError, match=message):
        command(*flags)
    assert not (tmp_path / "out.json").exists() or name == "exists"
