"""Tokenizers of GGUF files, rebuilt without a network."""

import json

import pytest

import qs_jax
from convert import hf_to_flax
from convert.errors import ConversionError
from convert.gguf_tokenizer import build_tokenizer
from convert.hf_to_flax import convert
from tests.convert.folders import LLAMA_CONFIG
from tests.convert.gguf_files import (
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    small_vocab,
    write_gguf,
)

pytest.importorskip("gguf")


def test_qwen2_text_is_cut_as_in_its_published_tokenizer(tmp_path):
    """As Qwen2TokenizerFast of transformers does with the same vocabulary."""
    from transformers import Qwen2TokenizerFast

    made = byte_level_tokenizer(pre="qwen2")

    def value(name, default=None):
        return made.get(name.removeprefix("tokenizer.ggml."), default)

    ours, _ = build_tokenizer(value, 300)
    vocab = {token: index for index, token in enumerate(made["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in made["merges"]]
    theirs = Qwen2TokenizerFast(vocab=vocab, merges=merges)
    for text in ("It's 12345 the  in\n\n the123 e\u0301!?\r\n", "Don'T  123 the\tin 中文 12"):
        assert ours(text).input_ids == theirs(text).input_ids


def test_byte_level_tokenizer(tmp_path, tensors):
    extra = {"tokenizer.chat_template": "{{ messages[0]['content'] }}!"}
    path = write_gguf(
        tmp_path / "m.gguf",
        small_vocab(tensors),
        LLAMA_CONFIG,
        tokenizer=byte_level_tokenizer(eot_token_id=5, eom_token_id=0),
        extra=extra,
    )
    model, _ = convert(str(path), tmp_path / "out")
    assert model.eos_token_ids == (0, 5), "every end token ends"
    tokenizer = qs_jax.load_tokenizer(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("in the 123").input_ids) == [
        *("in", "Ġthe", "Ġ", "1", "2", "3")
    ], "smollm splits digits before merging, so that 1 2 do not merge"
    for text in ("Héllo, wörld 😀\n\n  x", "عربي", "<|endoftext|>tail"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|endoftext|>").input_ids == [0]
    assert tokenizer.eos_token == "<|endoftext|>"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi!"


def test_sentencepiece_tokenizer_adds_its_bos(tmp_path, tensors):
    tokenizer = sentencepiece_tokenizer()
    path = write_gguf(tmp_path / "m.gguf", small_vocab(tensors), LLAMA_CONFIG, tokenizer=tokenizer)
    convert(str(path), tmp_path / "out")
    loaded = qs_jax.load_tokenizer(tmp_path / "out")
    tokens = loaded.convert_ids_to_tokens(loaded("the t😀").input_ids)
    emoji = [f"<0x{byte:02X}>" for byte in "😀".encode()]
    assert tokens == ["<s>", "▁the", "▁t", *emoji]
    assert loaded.decode(loaded("the t😀").input_ids, skip_special_tokens=True) == "the t😀"


def notes_of(tmp_path, tensors, name="m", **options):
    """What a conversion says, and the manifest keeps."""
    path = write_gguf(tmp_path / f"{name}.gguf", small_vocab(tensors), LLAMA_CONFIG, **options)
    with_tokenizer = "tokenizer" in options
    _, notes = convert(str(path), tmp_path / name, tokenizer=with_tokenizer)
    assert json.loads((tmp_path / name / "qs_jax.json").read_text())["notes"] == notes
    return [note for note in notes if "the rest has no text" not in note]


def test_a_missing_pre_tokenizer_is_the_default_of_llama_cpp(tmp_path, tensors, capsys):
    """Punctuation, words as in GPT-2, digits, threes of digits: cut one after the other."""
    made = byte_level_tokenizer(pre="", merges=["1 2", "12 3", ". .", "Ġ x"])
    made["tokens"][-4:] = ["12", "123", "..", "Ġx"]
    (note,) = notes_of(tmp_path, tensors, tokenizer=made)
    assert "tokenizer.ggml.pre is missing" in note
    tokenizer = qs_jax.load_tokenizer(tmp_path / "m")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("123123 x..").input_ids)
    assert pieces == ["123", "123", "Ġx", ".."]
    named = byte_level_tokenizer(pre="default", merges=made["merges"], tokens=made["tokens"])
    assert notes_of(tmp_path, tensors, "named", tokenizer=named) == []
    path = write_gguf(tmp_path / "a.gguf", small_vocab(tensors), LLAMA_CONFIG, tokenizer=made)
    for flags in ((), ("--quiet",)):
        command = ["--source", str(path), "--out", str(tmp_path / "a"), "--overwrite", *flags]
        assert hf_to_flax.main(command) == 0
        err = capsys.readouterr().err
        assert "pre-tokenizer" in err
        assert ("wrote llama" in err) == (not flags)
    assert "tensor" not in err, "no progress bar"


@pytest.mark.parametrize(
    ("kind", "missing", "note"),
    [
        ("gpt2", "token_type", "all tokens are taken as normal"),
        ("gpt2", "eos_token_id", "no token ends a text"),
        ("llama", "bos_token_id", "1 is taken, as in llama.cpp"),
        ("llama", "eos_token_id", "2 is taken, as in llama.cpp"),
        ("llama", "unknown_token_id", "0 is taken, as in llama.cpp"),
    ],
)
def test_documented_defaults_are_noted(tmp_path, tensors, kind, missing, note):
    made = byte_level_tokenizer() if kind == "gpt2" else sentencepiece_tokenizer()
    del made[missing]
    (said,) = notes_of(tmp_path, tensors, tokenizer=made)
    assert f"tokenizer.ggml.{missing} is missing" in said
    assert note in said
    model = qs_jax.load(tmp_path / "m")[1]
    assert kind == "gpt2" or (model.bos_token_id, model.eos_token_ids) == (1, (2,))


def test_a_missing_frequency_base_is_noted(tmp_path, tensors):
    leave_out = ("llama.rope.freq_base", "llama.rope.dimension_count")
    base, dims = notes_of(tmp_path, tensors, leave_out=leave_out)
    assert base == "llama.rope.freq_base is missing; 10000 is taken, llama.cpp's default"
    assert "llama.rope.dimension_count is missing; 8 is taken" in dims


def changed(made, **changes):
    return {key: value for key, value in (made | changes).items() if value is not ...}


BYTES, PIECES = byte_level_tokenizer(), sentencepiece_tokenizer()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (changed(BYTES, merges=...), "merges is missing"),
        (changed(BYTES, tokens=[*BYTES["tokens"][:-1], "!"]), "tokens holds '!' more than once"),
        (changed(BYTES, token_type=[1, 1]), "token_type has 2 entries for 262 tokens"),
        (changed(BYTES, merges=["1 2", "zz z"]), "incomplete or damaged"),
        (changed(BYTES, unknown_token_id="x"), "incomplete or damaged"),
        (changed(PIECES, scores=...), "scores is missing"),
        (changed(PIECES, scores=[0.0] * 266), "scores is the same for all tokens"),
        (changed(PIECES, scores=[0.0, float("nan")] * 133), "or not finite"),
        (changed(PIECES, scores=[0.0, 1.0]), "scores has 2 entries for 266 tokens"),
    ],
)
def test_tokenizers_that_are_incomplete(tmp_path, tensors, made, message):
    with pytest.raises(ConversionError, match=message):
        notes_of(tmp_path, tensors, tokenizer=made)


def test_empty_tokens_are_named_as_in_llama_cpp(tmp_path, tensors):
    tokens = [*BYTES["tokens"], "", ""]
    made = changed(BYTES, tokens=tokens, token_type=[*BYTES["token_type"], 5, 5])
    assert notes_of(tmp_path, tensors, tokenizer=made) == []
    assert qs_jax.load_tokenizer(tmp_path / "m").convert_ids_to_tokens([262]) == ["[EMPTY_262]"]
