"""`python -m benchmarks.linguistics` on a tiny model, its figures recounted."""

import json

import numpy as np
import pytest

import qs_jax
from benchmarks.linguistics import __main__ as study
from benchmarks.linguistics.classes import CATEGORIES, CONTENT
from benchmarks.linguistics.treebank import read_treebank
from qs_jax import presets
from qs_jax.config import Config, FusionConfig, HaltingConfig, KVSkipConfig, QuickSilverConfig
from qs_jax.errors import InputError
from tests.benchmarks.linguistics.miniature import write_treebank

WIDTH = 20
MIXED = QuickSilverConfig(
    halting=HaltingConfig(entropy=None, tau_drift=3.5, layers=(1, 2)),
    kv_skip=KVSkipConfig("skip"),
    fusion=FusionConfig(tau_fuse=1.0, distance="relative", first_layer=1),
    sink_tokens=2,
    recent_tokens=4,
)


def tags_of_tokens(text):
    """The tag of every token, "" for spaces: characters, but one for the blank line."""
    tags = [""] * len(text.text)
    for tag, (start, end) in zip(text.tags, text.spans, strict=True):
        tags[start:end] = [tag] * (end - start)
    del tags[text.text.index("\n\n")]
    return np.array(tags[: len(tags) // WIDTH * WIDTH]).reshape(-1, WIDTH)


@pytest.mark.slow
def test_one_preset_recounted(tiny_checkpoint, tmp_path):
    path, out = write_treebank(tmp_path), tmp_path / "out.json"
    preset = str(presets.save(tmp_path / "mixed.json", MIXED))
    flags = ["--ckpt", str(tiny_checkpoint), "--seq-len", str(WIDTH), "--out", str(out)]
    study.main([*flags, "--treebank", str(path), "--preset", preset])
    part = json.loads(out.read_text())["corpora"]["treebank"]
    row = part["rows"][f"preset | {preset} | teacher-forced"]

    params, model = qs_jax.load(tiny_checkpoint, dtype="float32")
    text = read_treebank(path)
    ids = qs_jax.load_tokenizer(tiny_checkpoint)(text.text).input_ids
    rows = np.array(ids[: len(ids) // WIDTH * WIDTH]).reshape(-1, WIDTH)
    cfg = Config(model=model, quicksilver=MIXED)
    with_all, dense = (qs_jax.score(params, rows, c) for c in (cfg, cfg.replace(quicksilver=None)))
    record = with_all.record
    content = np.isin(tags_of_tokens(text), ["NN", "NNP", "JJ", "RB", "VB", "VBD"])
    chosen = content & (np.arange(WIDTH) >= 2)
    halted = row["halting"]["paper"][CATEGORIES[5]]["halted"]
    assert (halted["hits"], halted["count"]) == ((record.depth < 3)[chosen].sum(), chosen.sum())
    assert 0 < halted["hits"] < halted["count"]
    fused = record.representative != np.arange(WIDTH)
    assert row["fusion"]["layer 3"]["pairs"] == fused.sum() > 5
    change = row["prediction"]["predicted"]["side"][CONTENT]
    later = content & (np.arange(WIDTH) > 0)
    assert change["tokens"] == later.sum()
    expected = (dense.logprobs - with_all.logprobs)[later].mean()
    assert change["nll_change"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(InputError, match="'off' has no mechanisms"):
        study.main([*flags, "--treebank", str(path), "--preset", "off"])
    with pytest.raises(InputError, match="give --treebank"):
        study.main(flags)
