"""The notebook runs from a checkpoint to a calibrated preset and its picture."""

from pathlib import Path

import pytest

import qs_jax

NOTEBOOK = Path(__file__).parents[2] / "examples" / "calibrate.ipynb"


@pytest.mark.slow
@pytest.mark.xdist_group("embedded")
def test_the_notebook_runs(embedded_checkpoint, tmp_path, monkeypatch):
    """In a kernel of its own, as a reader would run it; `execute` raises where a cell does."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for name, value in {"CKPT": embedded_checkpoint, "OUT": tmp_path}.items():
        monkeypatch.setenv(f"QS_JAX_{name}", str(value))
    monkeypatch.delenv("QS_JAX_TEXT", raising=False)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=1800, resources=where).execute()
    _, model = qs_jax.load(embedded_checkpoint)
    preset = qs_jax.presets.load(tmp_path / "calibrated.json", model)
    assert preset.provenance["max_ppl_increase"] == 1
    assert not preset.is_off, "half of the candidates cost next to nothing on this text"
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in shown)
    assert "of this prompt's FLOPs saved" in shown[-1]["text"]
