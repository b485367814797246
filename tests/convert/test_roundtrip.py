"""Hugging Face -> ours -> Hugging Face returns every tensor bit for bit."""

import json

import numpy as np
import pytest

from convert import flax_to_hf
from convert.hf_to_flax import convert
from qs_jax import load
from tests.support import CASES, hf_model, make_pair

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.hf
DEFAULT = {"gpt2-untied", "llama-biases", "llama-tied", "rope-yarn"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow) for name in CASES],
)
def test_every_tensor_comes_back_exactly(case, tmp_path):
    pair = make_pair(case, tmp_path)
    back = flax_to_hf.export(pair.folder, tmp_path / "back")
    again = type(pair.hf).from_pretrained(back)
    theirs, ours = pair.hf.state_dict(), again.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    tokens = torch.arange(2, 32)[None]
    with torch.no_grad():
        expected, logits = pair.hf(tokens).logits, again(tokens).logits
    # Close, not equal: torch itself differs in the last bit from run to run under load.
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5, msg="the config came back")


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_half_precision_is_held_exactly_in_float32(stored, tmp_path):
    hf = hf_model("llama").to(getattr(torch, stored))
    hf.save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), tmp_path / "ours", tokenizer=False)
    params, model = load(tmp_path / "ours")
    assert model.dtype == "float32"
    for name, tensor in flax_to_hf.hf_tensors(params, model).items():
        np.testing.assert_array_equal(tensor, hf.state_dict()[name].float().numpy(), name)


def test_bfloat16_stays_bfloat16(tmp_path):
    hf = hf_model("gpt2").to(torch.bfloat16)
    hf.save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), tmp_path / "ours", tokenizer=False, dtype="bfloat16")
    back = flax_to_hf.export(tmp_path / "ours", tmp_path / "back", max_shard_size="20KB")
    assert len(list(back.glob("*.safetensors"))) > 1
    again = type(hf).from_pretrained(back)
    assert again.dtype == torch.bfloat16
    for name, tensor in hf.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_an_existing_folder_is_not_touched(tmp_path, capsys):
    pair = make_pair("gpt2", tmp_path)
    before = sorted(path.name for path in pair.hf_folder.iterdir())
    arguments = ["--ckpt", str(pair.folder), "--out", str(pair.hf_folder)]
    assert flax_to_hf.main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert sorted(path.name for path in pair.hf_folder.iterdir()) == before
    assert flax_to_hf.main(["--ckpt", str(pair.folder), "--out", str(tmp_path / "new")]) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "gpt2"
