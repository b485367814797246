"""What the README shows runs as it stands, on the embedded model."""

import re
from pathlib import Path

import pytest

from examples import demo

pytestmark = pytest.mark.xdist_group("embedded")
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_python_examples_run(embedded_checkpoint, capsys, monkeypatch):
    """One after the other, as a reader would type them."""
    monkeypatch.chdir(README.parent)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for code in blocks:
        code = code.replace("ckpt/smollm2-135m", str(embedded_checkpoint))
        exec(compile(code, "README.md", "exec"), names)
    prompts, faster, own = blocks
    assert "balanced" in prompts
    assert "check_laws" in own
    printed = capsys.readouterr().out
    saved = re.search(r"(\d+)% of the tokens' layers left out", printed)
    assert 5 < int(saved[1]) < 20
    out = names["out"]
    assert 0 < out.passes[0] < out.lengths[0] == int(re.search(r"(\d+) tokens in", printed)[1])
    assert out.accepted[0] > 0
    assert "fast-answers" in faster


@pytest.mark.slow
def test_the_demo_runs(embedded_checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "ROUNDS", 1)
    demo.main(
        ["--ckpt", str(embedded_checkpoint), "--out", str(tmp_path), "--max-new-tokens", "48"]
    )
    printed = capsys.readouterr().out
    assert "The capital of France is Paris." in printed
    assert "simulated" not in printed
    table = printed[printed.index("the dense model against") :]
    assert re.search(r"read 384 tokens .* balanced .* \d+%", table)
    assert re.search(r"answer in .* drafts .* \d+%", table)
    assert "perplexity" in table
    assert str(tmp_path / "report.html") in printed.replace("\n", "")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "balanced" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_stays_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160
