"""`python -m qs_jax evaluate` on a tiny model: its numbers, its file, kill and resume, mistakes."""

import json
import shutil

import numpy as np
import pytest
import scipy.special

import qs_jax
from qs_jax import cli, presets
from qs_jax.commands import evaluate
from qs_jax.config import HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.evaluation import perplexity, rows
from qs_jax.files import write_json
from qs_jax.mechanisms.kv_maps import KVMaps

pytestmark = pytest.mark.xdist_group("evaluate")
# Nine windows of 24 and 5 tokens over; batches of 4, 4 and 1.
TEXT = ("the quick brown fox jumps over the lazy dog; " * 5)[:221]
WIDTH, WINDOWS, CONTINUED = 24, 9, 8
TOP = ["perplexity", "tokens_scored", "paper_flops_saved", "exact_flops_saved", "kv_bytes_saved"]
TOP += ["layer_tokens_saved", "nll", "perplexity_interval", "windows", "per_window", "counts"]
TOP += ["summary", "simulated", "idle", "text", "config", "model", "versions", "git"]


@pytest.fixture(scope="module")
def ckpt(tiny_checkpoint, tmp_path_factory):
    """A copy: maps are put beside it."""
    return shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("evaluate") / "ckpt")


@pytest.fixture
def run(ckpt, tmp_path):
    """Runs the command in a fresh folder that holds the text; returns its exit code."""
    (tmp_path / "text.txt").write_text(TEXT)

    def run(*flags, data=tmp_path / "text.txt", out="out.json"):
        command = ["evaluate", "--ckpt", str(ckpt), "--data", str(data)]
        command += ["--out", str(tmp_path / out), "--batch-size", "4"]
        command += [] if "--seq-len" in flags else ["--seq-len", str(WIDTH)]
        return cli.main([*command, *flags])

    return run


@pytest.fixture
def use_preset(monkeypatch):
    """Makes every preset name mean this configuration."""

    def use(quicksilver):
        monkeypatch.setattr(presets, "by_name", lambda name, model: quicksilver)

    return use


def halting(policy="skip", **settings):
    halt = {"entropy": None, "tau_drift": 1e9, "layers": (1, 2)} | settings
    return QuickSilverConfig(
        halting=HaltingConfig(**halt), kv_skip=KVSkipConfig(policy), recent_tokens=2
    )


def read(tmp_path, name="out.json"):
    return json.loads((tmp_path / name).read_text())


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def direct_nll(ckpt, protocol="teacher-forced", quicksilver=None):
    """Each window's negative log-likelihoods, from logits, in NumPy."""
    params, model = qs_jax.load(ckpt)
    ids = qs_jax.load_tokenizer(ckpt)(TEXT).input_ids
    rows = np.array(ids[: WINDOWS * WIDTH]).reshape(WINDOWS, WIDTH)
    cfg = qs_jax.Config(
        model=model, quicksilver=quicksilver, protocol=protocol, continuation_tokens=CONTINUED
    )
    logits = qs_jax.score(params, rows, cfg, return_logits=True).logits.astype(np.float64)
    logprobs = scipy.special.log_softmax(logits, axis=-1)
    first = 1 if protocol == "teacher-forced" else WIDTH - CONTINUED
    picked = np.take_along_axis(logprobs[:, :-1], rows[:, 1:, None], axis=-1)[..., 0]
    return -picked[:, first - 1 :]


@pytest.mark.parametrize("quicksilver", [None, halting()])
@pytest.mark.parametrize("protocol", ["teacher-forced", "continuation"])
def test_perplexity_is_that_of_the_logits(
    ckpt, run, use_preset, tmp_path, capsys, protocol, quicksilver
):
    if quicksilver is not None:
        use_preset(quicksilver)
    assert run("--protocol", protocol, "--continuation-tokens", str(CONTINUED)) == 0
    nll = direct_nll(ckpt, protocol, quicksilver)
    got = read(tmp_path)
    assert list(got) == TOP
    assert got["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert got["nll"] == pytest.approx(nll.mean(), rel=1e-5)
    assert got["tokens_scored"] == nll.size
    assert got["per_window"]["nll"] == pytest.approx(nll.mean(axis=1), rel=1e-5)
    assert got["per_window"]["tokens"] == [nll.shape[1]] * WINDOWS
    half = 2.306004 * nll.mean(axis=1).std(ddof=1) / 3  # Student's t for 8 degrees of freedom
    expected = np.exp([nll.mean() - half, nll.mean() + half])
    assert got["perplexity_interval"] == pytest.approx(expected, rel=1e-5)
    assert got["simulated"] is (quicksilver is not None)
    for name in TOP[2:6]:
        assert 0 < got[name] < 1 if got["simulated"] else got[name] == 0
        assert got["summary"][name] == got[name]
    assert len(got["counts"]["prefill"]["per_layer"]["layer_tokens"]) == 3
    shown = capsys.readouterr()
    assert f"{got['perplexity']:,.4g}" in shown.out
    assert ("simulated" in shown.out) is got["simulated"]
    assert "perplexity" in shown.err
    assert sorted(content(tmp_path)) == ["out.json", "text.txt"]


def test_the_file_says_what_was_run(ckpt, run, tmp_path):
    assert run("--limit-windows", "5") == 0
    got = read(tmp_path)
    assert got["windows"] == 5
    counts = {"characters": 221, "documents": 1, "tokens": 221, "tokens_left_over": 5}
    assert got["text"] == counts
    expected = {"protocol": "teacher-forced", "continuation_tokens": None, "seq_len": WIDTH}
    expected |= {"batch_size": 4, "limit_windows": 5, "preset": "off", "engine": "masked"}
    expected |= {"dtype": "float32", "data": "text.txt"}
    expected |= {"quicksilver": QuickSilverConfig().to_dict()}
    assert got["config"] | expected == got["config"]
    assert got["model"]["config"] == qs_jax.load(ckpt)[1].to_dict()
    assert set(got["versions"]) == {"python", "jax", "jaxlib", "flax", "numpy", "qs_jax"}
    assert str(tmp_path) not in json.dumps(got["config"])


def test_a_short_text_and_lines_of_json_in_another_dtype(run, tmp_path):
    (tmp_path / "short.txt").write_text("hello")
    assert run(data=tmp_path / "short.txt") == 0
    got = read(tmp_path)
    assert (got["windows"], got["tokens_scored"]) == (1, 4)
    assert got["perplexity_interval"] is None
    lines = [json.dumps({"text": part}) for part in (TEXT[:50], TEXT[50:100])]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    assert run("--dtype", "bfloat16", "--overwrite", data=tmp_path / "text.jsonl") == 0
    got = read(tmp_path)
    assert got["config"]["dtype"] == got["model"]["config"]["dtype"] == "bfloat16"
    assert got["windows"] == 4


def kill_after(monkeypatch, batches):
    """Ctrl-C in the batch that follows."""
    calls = []

    def score(*args, **options):
        calls.append(None)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return qs_jax.score(*args, **options)

    monkeypatch.setattr(rows, "score", score)
    return calls


@pytest.mark.parametrize(
    ("quicksilver", "torn"), [(QuickSilverConfig(), b""), (halting(), b'{"nll": [1.0, 2')]
)
def test_killed_and_resumed_is_the_same_file(
    run, use_preset, tmp_path, monkeypatch, capsys, quicksilver, torn
):
    use_preset(quicksilver)
    assert run(out="whole.json") == 0
    for flags in ([], ["--resume"]):  # one batch each, then killed
        with monkeypatch.context() as patch:
            kill_after(patch, 1)
            assert run(*flags) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert sorted(content(tmp_path)) == ["out.json.partial", "text.txt", "whole.json"]
    with (tmp_path / "out.json.partial").open("ab") as file:
        file.write(torn)
    calls = kill_after(monkeypatch, 99)
    assert run("--resume") == 0
    assert len(calls) == 1
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sorted(content(tmp_path)) == ["out.json", "text.txt", "whole.json"]


def test_killed_before_the_first_batch_or_after_the_last(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 0)
        assert run() == 130
    assert sorted(content(tmp_path)) == ["text.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_json", lambda path, content: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    calls = kill_after(monkeypatch, 0)
    assert run("--resume") == 0
    assert calls == []
    assert read(tmp_path)["windows"] == WINDOWS


def error_of(capsys, code):
    captured = capsys.readouterr().err
    assert (code, captured.count("error: ")) == (1, 1), captured
    last = captured.splitlines()[-1]
    assert last.startswith("error: ")
    return last


MISTAKES = {
    "seq-len": (["--seq-len", "129"], "windows of 129 tokens exceed this model's 128 positions"),
    "c4": (["--data", "c4"], "--limit-windows"),
    "offline": (["--data", "wikitext-103"], "give a local file"),
    "continuation": (["--protocol", "continuation"], "raise --seq-len, lower --continuation"),
    "no windows": (["--limit-windows", "0"], "--limit-windows must be at least 1"),
    "no width": (["--seq-len", "1"], "--seq-len must be at least 2"),
    "both": (["--resume"], "give one"),
    "short": (["--data", "short.txt"], "must have at least 2 tokens, got 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_clear_line(run, tmp_path, monkeypatch, capsys, name):
    """The results that stand there stay as they are, even where they may be replaced."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.json").write_text("precious")
    (tmp_path / "short.txt").write_text("x")
    before = content(tmp_path)
    flags, message = MISTAKES[name]
    assert message in error_of(capsys, run(*flags, "--overwrite"))
    assert content(tmp_path) == before


def test_results_are_not_replaced_unasked(run, tmp_path, capsys, monkeypatch):
    assert run() == 0
    before = content(tmp_path)
    assert "--overwrite" in error_of(capsys, run())
    monkeypatch.setattr(perplexity, "git_hash", lambda: "a later commit")
    assert run("--resume") == 0
    assert "is complete" in capsys.readouterr().out
    error = error_of(capsys, run("--resume", "--batch-size", "3", "--limit-windows", "2"))
    assert "config.batch_size is 4, now 3; config.limit_windows is null, now 2;" in error
    assert content(tmp_path) == before
    assert run("--overwrite", "--limit-windows", "2") == 0
    assert read(tmp_path)["windows"] == 2


def test_unfinished_runs_are_not_replaced_unasked(run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        assert run() == 130
    capsys.readouterr()
    before = content(tmp_path)
    assert "pass --overwrite to start anew or --resume" in error_of(capsys, run())
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    other = error_of(capsys, run("--resume", data=tmp_path / "other.txt"))
    assert 'config.data is "text.txt", now "other.txt"' in other
    assert "config.data_sha256" in other
    assert {k: v for k, v in content(tmp_path).items() if k != "other.txt"} == before
    monkeypatch.setattr(perplexity, "git_hash", lambda: "another commit")
    assert "git is" in error_of(capsys, run("--resume"))
    assert run("--overwrite") == 0
    assert not (tmp_path / "out.json.partial").exists()


@pytest.mark.parametrize(
    ("name", "texts", "message"),
    [
        ("out.json", ("", "notes", "[]", '{"config": {}}'), "is not a results file"),
        ("out.json.partial", ("notes\n", "[]\n", '{"config": {}}\nnotes\n'), "is damaged"),
    ],
)
def test_resume_does_not_take_any_file_for_its_own(run, tmp_path, capsys, name, texts, message):
    for text in texts:
        (tmp_path / name).write_text(text)
        assert message in error_of(capsys, run("--resume"))
        assert (tmp_path / name).read_text() == text


def test_maps_of_the_checkpoint_or_of_a_file(ckpt, run, use_preset, tmp_path, capsys):
    use_preset(halting("extrapolate", layers=(2,)))
    assert "there are no KV maps" in error_of(capsys, run())
    model = qs_jax.load(ckpt)[1]
    shape = (model.num_layers, 2, model.hidden_size + 1, 2 * model.kv_size)
    rng = np.random.default_rng(0)
    for name, path in (("a.json", tmp_path / "maps.safetensors"), ("b.json", ckpt)):
        maps = rng.normal(size=shape).astype(np.float32)
        path = KVMaps(maps_LXFO=maps, layers=(1, 2), features=("state",)).save(path)
        flags = ["--protocol", "continuation", "--continuation-tokens", str(CONTINUED)]
        flags += ["--kv-maps", str(path)] if name == "a.json" else []
        assert run(*flags, out=name) == 0
        if path.parent == ckpt:
            path.unlink()
    one, two = read(tmp_path, "a.json"), read(tmp_path, "b.json")
    assert one["config"]["kv_maps_sha256"] != two["config"]["kv_maps_sha256"]
    assert one["perplexity"] != two["perplexity"]


def test_numbers_at_the_edge(monkeypatch, tmp_path):
    assert perplexity.interval(np.array([2.0, 2.0])) == [np.exp(2.0)] * 2
    low, high = perplexity.interval(np.array([700.0, 800.0]))
    assert low is not None
    assert high is None
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert content(tmp_path) == {}
    monkeypatch.setattr(perplexity, "__file__", str(tmp_path / "perplexity.py"))
    assert perplexity.git_hash() is None, "outside a repository"


def test_the_perplexity_does_not_depend_on_the_devices(run, tmp_path):
    """Nine windows in batches of four: the last batch has fewer windows than devices."""
    assert run(out="one.json") == 0
    one = read(tmp_path, "one.json")
    for devices in ("all", "2x2"):
        assert run("--devices", devices, out=f"{devices}.json") == 0
        more = read(tmp_path, f"{devices}.json")
        assert more["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
        assert more["config"] == one["config"]
        assert more["counts"] == one["counts"]
