"""A tiny checkpoint whose tokens are words, and a preset that acts on short prompts."""

import re
from pathlib import Path

import pytest

from convert.hf_to_flax import convert
from examples.text import REVIEW
from qs_jax import presets
from qs_jax.checkpoint import transformers
from qs_jax.config import HaltingConfig, KVSkipConfig, QuickSilverConfig
from tests.convert.folders import llama_tensors, write_folder


def word_tokenizer(folder: Path) -> None:
    """Words and marks of the review, 97 ids with `<s>`, `</s>` and the unknown word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]", REVIEW))
    vocab = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *words][:97])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(str(folder))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    """Tables are printed without breaking cells."""
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("examples")
    write_folder(folder / "hf", llama_tensors()[0], tokenizer=False)
    word_tokenizer(folder / "hf")
    convert(str(folder / "hf"), folder / "ckpt")
    return str(folder / "ckpt")


@pytest.fixture(scope="session")
def preset(tmp_path_factory) -> str:
    halting = HaltingConfig(rule="quota", layers=(1,), quota=(0.8,), entropy=None)
    qs = QuickSilverConfig(
        halting=halting, kv_skip=KVSkipConfig("skip"), sink_tokens=1, recent_tokens=2
    )
    return str(presets.save(tmp_path_factory.mktemp("preset") / "quota.json", qs))
