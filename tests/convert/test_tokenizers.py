"""tokenizer.json is obeyed to the letter; other tokenizers give text back."""

import json
import sys

import pytest

import qs_jax
from convert import tokenizer as check
from convert.errors import ConversionError
from convert.hf_to_flax import convert
from convert.tokenizer import PROBES, check_tokenizer
from qs_jax.checkpoint import read_tokenizer
from qs_jax.testing import tiny_model
from tests.convert.folders import llama_tensors, write_folder
from tests.convert.gguf_files import byte_level_tokenizer

MODEL = tiny_model(vocab_size=300)
TEXTS = [*PROBES, "the 12 in the", "!!", "<|endoftext|>x [PAD] don 't ."]


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer that begins texts with its one special token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    made = byte_level_tokenizer()
    vocab = {token: index for index, token in enumerate(made["tokens"])}
    merges: list = [tuple(merge.split(" ")) for merge in made["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def write_config(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


AUTO_MAP = {"auto_map": {"AutoTokenizer": ["tokenization_yi.YiTokenizer", None]}}
SETTINGS = {
    "absent": {},
    "class": {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": True},
    "auto_map": {"tokenizer_class": "LlamaTokenizer"} | AUTO_MAP,
    "auto_map only": AUTO_MAP,
    "old class": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"},
    "unknown class": {"tokenizer_class": "SomeTokenizer"},
    "pad": {"pad_token": "!", "eos_token": "<|endoftext|>"},
    "new pad": {"pad_token": "[PAD]", "additional_special_tokens": ["the"]},
    "added": {"added_tokens_decoder": {"900": {"content": "the", "special": True}}},
    "begin": {"add_bos_token": False, "add_eos_token": True, "eos_token": "<|endoftext|>"},
    "clean": {"clean_up_tokenization_spaces": True, "split_special_tokens": True},
    "short": {"model_max_length": 3, "truncation_side": "left", "padding_side": "left"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_overrules_tokenizer_json(folder, name):
    from tokenizers import Tokenizer

    if SETTINGS[name]:
        write_config(folder, **SETTINGS[name])
    notes = check_tokenizer(folder, MODEL)
    ours, raw = read_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        for special in (True, False):
            ids = raw.encode(text, add_special_tokens=special).ids
            assert ours(text, add_special_tokens=special).input_ids == ids
            assert ours.decode(ids) == raw.decode(ids, skip_special_tokens=False)
            assert ours.decode(ids, skip_special_tokens=True) == raw.decode(ids)
    assert len(ours) == raw.get_vocab_size()
    assert None not in ours.all_special_ids
    expected = {
        "new pad": ["pad_token [PAD] is not in tokenizer.json and is ignored"],
        "begin": [
            "add_bos_token is False, but tokenizer.json adds one, and is obeyed",
            "add_eos_token is True, but tokenizer.json adds none, and is obeyed",
        ],
    }
    assert notes == expected.get(name, [])


def test_a_tokenizer_that_truncates_and_pads_by_itself(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 20},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    file.write_text(json.dumps(content))
    assert check_tokenizer(folder, MODEL) == [
        "tokenizer.json truncates or pads texts; here they stay whole"
    ]
    tokenizer = read_tokenizer(folder)
    for text in ("in", "in the " * 20):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_differences_are_refused_by_name(folder, monkeypatch):
    def differing(path):
        tokenizer = read_tokenizer(path)
        tokenizer.add_tokens(["def"])
        return tokenizer

    monkeypatch.setattr(check, "read_tokenizer", differing)
    with pytest.raises(ConversionError, match=r"differs from tokenizer\.json on .def f.*encodes"):
        check_tokenizer(folder, MODEL)


@pytest.mark.parametrize("where", ["added_tokens", "tokenizer_config"])
def test_added_tokens_with_other_ids_are_refused(folder, where):
    if where == "added_tokens":
        (folder / "added_tokens.json").write_text('{"<|im_start|>": 270}')
    else:
        write_config(folder, added_tokens_decoder={"270": {"content": "<|im_start|>"}})
    with pytest.raises(ConversionError, match=r"<\|im_start\|> = 270 are not so in its tokenizer"):
        check_tokenizer(folder, MODEL)


def test_a_chat_template_beside_tokenizer_json(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    message = [{"role": "user", "content": "hi"}]
    assert read_tokenizer(folder).apply_chat_template(message, tokenize=False) == "hi!"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "GPT2Tokenizer"}, None),
        ({"tokenizer_class": "GPT2Tokenizer"} | AUTO_MAP, None),
        ({"tokenizer_class": "LlamaTokenizer"}, "do not belong together"),
        ({"tokenizer_class": "BertTokenizer"}, "do not belong together"),
        (AUTO_MAP, "cannot be read"),
    ],
)
def test_vocabulary_and_merges_alone(folder, settings, message):
    """Without tokenizer.json the class decides, and text must come back."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines))
    write_config(folder, **settings)
    if message:
        with pytest.raises(ConversionError, match=message):
            check_tokenizer(folder, MODEL)
    else:
        assert check_tokenizer(folder, MODEL) == []
        tokenizer = read_tokenizer(folder)
        assert tokenizer.convert_ids_to_tokens(tokenizer("in the").input_ids) == ["in", "Ġthe"]


def test_without_transformers_tokens_work_and_text_is_refused(tmp_path, monkeypatch):
    """The base install: a Hugging Face folder converts, loads and generates."""
    source = write_folder(tmp_path / "hf", llama_tensors()[0])
    monkeypatch.setitem(sys.modules, "transformers", None)
    _, notes = convert(str(source), tmp_path / "ckpt")
    assert any("transformers is not installed" in note for note in notes)
    params, model = qs_jax.load(tmp_path / "ckpt")
    assert qs_jax.generate(params, [[3, 4]], qs_jax.Config(model, max_new_tokens=2)).lengths[0] > 0
    with pytest.raises(qs_jax.InputError, match=r"pip install 'qs-jax\[text\]'"):
        qs_jax.load_tokenizer(tmp_path / "ckpt")
    monkeypatch.undo()
    assert qs_jax.load_tokenizer(tmp_path / "ckpt")("a").input_ids
