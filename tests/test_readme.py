"""What the README shows runs as it stands, on the embedded model."""

import re
from pathlib import Path

import pytest

from examples import demo

pytestmark = pytest.mark.xdist_group("embedded")
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_python_examples_run(embedded_checkpoint, capsys):
    """One after the other, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for code in blocks:
        code = code.replace("ckpt/smollm2-135m", str(embedded_checkpoint))
        exec(compile(code, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert len(blocks) == 2
    assert names["saved"]["layer_tokens_saved"] >= 0
    assert printed.startswith("The capital of France is")
    assert "\nOnce upon a time" in printed


@pytest.mark.slow
def test_the_demo_runs(embedded_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(demo, "STEPS", 4)
    ckpt = str(embedded_checkpoint)
    demo.main(["--ckpt", ckpt, "--max-new-tokens", "12", "--presets", "balanced"])
    printed = capsys.readouterr().out
    assert "The capital of France is Paris." in printed
    assert "decode" in printed
    assert "simulated" not in printed
    dense, balanced = printed.split("│ off ")[1].split("│ balanced ")
    in_brackets = re.compile(r"\((-?\d+)%\)")  # one round: a time may be anything
    assert in_brackets.findall(dense) == ["100"] * 3
    _, _, kv_share = in_brackets.findall(balanced)
    assert int(kv_share) == 100, "keys of tokens that stopped are extrapolated: none is missing"


def test_it_stays_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
