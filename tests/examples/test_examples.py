"""Every example runs in a small form, and prints what the library says."""

import importlib
import io
import json
import pkgutil
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest

import examples
import qs_jax
from examples import (
    calibrate_and_serve,
    key_norm,
    make_report,
    pmap_evaluation,
    profiling,
    protect_negations,
    quickstart,
    streaming_chat,
)
from examples.text import REVIEW
from qs_jax.testing import tiny_model

SCRIPTS = (
    "calibrate_and_serve demo key_norm make_report pmap_evaluation profiling protect_negations "
    "quickstart streaming_chat"
).split()


def loaded(ckpt):
    params, model = qs_jax.load(ckpt)
    return params, model, qs_jax.load_tokenizer(ckpt)


def table(printed):
    """Cells of a printed table, by the first of each row."""
    lines = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_none_is_forgotten():
    """Each has a test here, but for the demo (tests/test_readme.py)."""
    assert [module.name for module in pkgutil.iter_modules(examples.__path__)] == [*SCRIPTS, "text"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"examples.{name}").main(["--help"])
    assert stopped.value.code == 0


def test_quickstart(ckpt, preset, capsys):
    prompt = "I did not like this film"
    command = ["--ckpt", ckpt, "--preset", preset, "--prompts", prompt, "--max-new-tokens", "6"]
    quickstart.main(command)
    printed = capsys.readouterr().out
    params, model, tokenizer = loaded(ckpt)
    qs = qs_jax.presets.load(preset, model)
    cfg = qs_jax.Config(model, qs, max_new_tokens=6)
    ids = tokenizer([prompt]).input_ids
    out = qs_jax.generate(params, ids, cfg)
    assert tokenizer.decode(out.sequences[0], skip_special_tokens=True) in printed
    assert f"{out.record.layer_tokens_saved:.1%}" in printed
    perplexity = qs_jax.score(params, ids, qs_jax.Config(model)).perplexity
    assert f"dense: {perplexity:.2f}" in printed


def test_key_norm_writes_a_preset_that_holds_its_score(tmp_path):
    key_norm.main(["--out", str(tmp_path / "norm.json"), "--layer", "1", "--share", "0.25"])
    halting = qs_jax.presets.load(tmp_path / "norm.json", tiny_model()).halting
    assert (halting.score, halting.quota) == (key_norm.key_norm, (0.25,))


@pytest.mark.slow
def test_streaming_chat_remembers(ckpt, capsys, monkeypatch):
    """The second answer is that to both questions and the first answer."""
    questions = ["I like the film", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions, "", ""])))
    command = ["--ckpt", ckpt, "--max-new-tokens", "5", "--temperature", "0", "--system", "the"]
    streaming_chat.main(command)
    printed = capsys.readouterr().out
    answers = re.findall(r"model> (.*)\n", printed)
    assert len(answers) == 2
    params, model, tokenizer = loaded(ckpt)
    cfg, read = qs_jax.Config(model, max_new_tokens=5), []
    messages = [{"role": "system", "content": "the"}]
    for question, answer in zip(questions, answers, strict=True):
        ids = all_ids(tokenizer, messages, question)
        tokens = [int(step.tokens[0]) for step in qs_jax.stream(params, [ids], cfg)]
        assert answer.split() == tokenizer.decode(tokens, skip_special_tokens=True).split()
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
        read.append(len(ids))
    first, second = map(int, re.findall(r"prefill (\d+) tokens", printed))
    assert first == read[0]
    assert second == read[1] - read[0] - len(answers[0].split()) + 1, "its own tokens, and the last"


def all_ids(tokenizer, messages, question, limit=1000):
    chat = streaming_chat.Conversation(tokenizer, limit)
    chat.messages = list(messages)
    return chat.ask(question)


def test_a_long_conversation_loses_its_oldest_turns(ckpt):
    tokenizer = qs_jax.load_tokenizer(ckpt)
    system = {"role": "system", "content": "the"}
    turns = [
        {"role": role, "content": "film " * 10} for _ in range(3) for role in ("user", "assistant")
    ]
    whole = all_ids(tokenizer, [system, *turns], "never")
    cut = all_ids(tokenizer, [system, *turns], "never", len(whole) - 1)
    assert cut == all_ids(tokenizer, [system, *turns[2:]], "never")
    with pytest.raises(qs_jax.InputError, match="more than the 5 tokens"):
        all_ids(tokenizer, [], "film " * 10, 5)


def test_negations_in_every_spelling(ckpt):
    tokenizer = qs_jax.load_tokenizer(ckpt)
    ids = protect_negations.negation_ids(tokenizer)
    found = {tokenizer.decode([token]) for token in ids}
    assert {"not", "nobody", "nothing", "never", "no"} <= found
    assert found <= set(REVIEW.replace(".", "").split())
    with pytest.raises(qs_jax.InputError, match="no negation"):
        protect_negations.main(["--ckpt", ckpt, "--text", "I like this film"])


@pytest.mark.slow
def test_protect_negations(ckpt, preset, capsys):
    text = " ".join(REVIEW.split()[:75])
    command = ["--ckpt", ckpt, "--preset", preset, "--continuation-tokens", "16", "--text", text]
    protect_negations.main(command)
    printed = capsys.readouterr().out
    rows = table(printed)
    perplexities = [float(row[0]) for row in rows.values()]
    assert len(set(perplexities)) == 3, "dense, the preset, and with negations protected"
    drifts, savings = (
        [float(row[column].strip("%")) for row in list(rows.values())[1:]] for column in (2, 3)
    )
    assert 0 < drifts[1] < drifts[0]
    assert 0 < savings[1] <= savings[0]


@pytest.mark.slow
def test_pmap_evaluation_gives_one_number(ckpt, capsys, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(REVIEW.split()))
    command = ["--ckpt", ckpt, "--text", str(tmp_path / "text.txt"), "--seq-len", "16"]
    pmap_evaluation.main(command)
    rows = table(capsys.readouterr().out)
    assert list(rows) == ["1", str(jax.local_device_count())]
    perplexities = [float(row[0]) for row in rows.values()]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-6)


@pytest.mark.slow
def test_profiling(ckpt, capsys, tmp_path):
    """The dense model alone; tests/benchmarks/test_trace.py looks at mechanisms."""
    command = ["--ckpt", ckpt, "--preset", "off", "--out", str(tmp_path), "--prompt", "24"]
    profiling.main(command)
    printed = capsys.readouterr().out
    assert float(table(printed)["attention"][0]) > 0
    assert printed.count("Perfetto opens") == len(list(tmp_path.rglob("*.xplane.pb"))) == 1


@pytest.mark.slow
def test_make_report(ckpt, preset, capsys, tmp_path):
    out, text = tmp_path / "report.html", " ".join(REVIEW.split()[:30])
    make_report.main(["--ckpt", ckpt, "--out", str(out), "--text", text, "--presets", preset])
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert "expect" in out.read_text(encoding="utf-8")


@contextmanager
def serving(app):
    """A real server on a free port; its address."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 60
        while not server.started and time.monotonic() < until:
            time.sleep(0.02)
        assert server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/generate"
    finally:
        server.should_exit = True
        thread.join(timeout=60)
    assert not thread.is_alive()


def post(address, content):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    request = urllib.request.Request(address, data=body, method="POST")
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.headers["content-type"], answer.read().decode()


def refusal(address, content):
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, content)
    with caught.value as error:
        assert error.code == 400
        return json.loads(error.read())["error"]


@pytest.mark.slow
def test_serving(ckpt, preset):
    pytest.importorskip("starlette")
    args = calibrate_and_serve.Arguments(ckpt=Path(ckpt), preset=Path(preset), max_new_tokens=6)
    model = calibrate_and_serve.prepare(args)
    params, config, tokenizer = loaded(ckpt)
    prompt = "I did not like this film"
    cfg = qs_jax.Config(config, qs_jax.presets.load(preset, config), max_new_tokens=6)
    out = qs_jax.generate(params, tokenizer([prompt]).input_ids, cfg)
    expected = tokenizer.decode(out.tokens[0, : out.lengths[0]], skip_special_tokens=True)
    with serving(calibrate_and_serve.make_app(model)) as address:
        kind, body = post(address, {"prompt": prompt})
        assert kind == "application/json"
        answer = json.loads(body)
        assert answer["text"].split() == expected.split()
        assert answer["new_tokens"] == int(out.lengths[0])
        kind, body = post(address, {"prompt": prompt, "stream": True})
        assert kind.startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in body.split("\n\n") if line]
        assert len(events) > 2
        assert "".join(event.get("text", "") for event in events) == answer["text"]
        assert events[-1] == {"done": True, "new_tokens": answer["new_tokens"]}
        assert "the prompt is empty" in refusal(address, {})
        assert "unknown field 'prompts'" in refusal(address, {"prompts": "x"})
        assert "wrong type" in refusal(address, {"prompt": 3})
        assert "at most 6" in refusal(address, {"prompt": "I", "max_new_tokens": 7})
        assert "positions" in refusal(address, {"prompt": "film " * 125})
        assert "JSON object" in refusal(address, [])
        assert refusal(address, b"{")
