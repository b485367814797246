"""The check of a tokenizer at conversion: what will be loaded does what its files say."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from convert.errors import ConversionError
from convert.sources import read_object
from qs_jax.checkpoint import read_tokenizer
from qs_jax.config import ModelConfig
from qs_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What tokenizers are known to disagree on: digits, runs of spaces, both ends, line breaks, tabs,
# code, contractions, accents, several scripts, emoji with joiners.
PROBES = (
    "Hello, world! 123 + 45 = (x)",
    "  1234567890  3.14159\n\n\n x\t\ty   z  ",
    "def f(x):\n    return x[0] != 'a'  # don't, we'll, I'M\r\n",
    "Ünïcödé ﬁ e\u0301 naïve 中文字符 日本語テスト 한국어 русский עברית العربية हिन्दी ไทย 👩‍💻🇪🇺😀",
    "a . b , c ? d ' s <s> </s> <|endoftext|> <unk>",
)


def check_tokenizer(folder: Path, model: ModelConfig) -> list[str]:
    """The tokenizer must load from the new folder alone and fit the vocabulary.

    Returns:
      Notes for the user.

    Raises:
      ConversionError: It cannot be read, does not do what its files say, or has too many ids.
    """
    file, notes = folder / "tokenizer.json", []
    try:
        tokenizer = read_tokenizer(folder)
    except InputError as error:  # transformers is not installed
        if not file.is_file():
            raise ConversionError(f"without tokenizer.json, {error}") from error
        notes.append("transformers is not installed: how it loads the tokenizer was not checked")
        tokenizer = None
    except Exception as error:  # transformers raises many kinds
        reason = f"the tokenizer cannot be read ({type(error).__name__}: {error})"
        raise ConversionError(f"{reason}. --no-tokenizer works with token ids.") from error
    if file.is_file():
        raw = _read_raw(file, notes)
        if tokenizer is not None:
            _compare(tokenizer, raw)
        notes += _settings_overruled(folder, raw, model)
    else:
        assert tokenizer is not None
        raw = tokenizer.backend_tokenizer
        if str(tokenizer.decode(tokenizer(PROBES[0]).input_ids, True)).strip() != PROBES[0]:
            raise ConversionError(
                f"the tokenizer's files and its class, {type(tokenizer).__name__}, do not belong "
                "together: text does not come back. Add its tokenizer.json, or --no-tokenizer."
            )
    ids, vocab = raw.get_vocab_size(with_added_tokens=False), model.vocab_size
    if ids > vocab:
        raise ConversionError(f"another model's tokenizer: it has {ids} ids, the model {vocab}.")
    if (outside := raw.get_vocab_size() - vocab) > 0:
        added = f"{outside} added token(s) of the tokenizer are outside the vocabulary of {vocab}"
        notes.append(f"{added}; prompts that use them will be refused")
    return notes


def _read_raw(file: Path, notes: list[str]) -> Tokenizer:
    """What a tokenizer.json says, for whole texts."""
    from tokenizers import Tokenizer

    try:
        raw = Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing more special
        raise ConversionError(f"tokenizer.json cannot be read: {error}") from error
    if raw.truncation or raw.padding:
        notes.append("tokenizer.json truncates or pads texts; here they stay whole")
    raw.no_truncation()
    raw.no_padding()
    return raw


def _compare(tokenizer: Any, raw: Tokenizer) -> None:
    """Refuse a loaded tokenizer that does not do what tokenizer.json says."""
    for probe in PROBES:
        for special in (True, False):
            ids = raw.encode(probe, add_special_tokens=special).ids
            ours = tokenizer(probe, add_special_tokens=special, verbose=False).input_ids
            text = raw.decode(ids, skip_special_tokens=not special)
            back = tokenizer.decode(ids, skip_special_tokens=not special)
            if (ours, back) != (ids, text):
                differing = f"encodes it as {short(ours)} instead of {short(ids)}"
                if ours == ids:
                    differing = f"decodes it as {back!r} instead of {text!r}"
                raise ConversionError(
                    f"the tokenizer that transformers loads differs from tokenizer.json on "
                    f"{probe!r}: it {differing}. --no-tokenizer works with token ids."
                )


def _settings_overruled(folder: Path, raw: Tokenizer, model: ModelConfig) -> list[str]:
    """Settings beside tokenizer.json that say something else; refuses other ids for its tokens."""
    config, added = ({}, {})
    if (folder / "tokenizer_config.json").is_file():
        config = read_object(folder / "tokenizer_config.json")
    if (folder / "added_tokens.json").is_file():
        added = read_object(folder / "added_tokens.json")
    listed = config.get("added_tokens_decoder")
    for index, token in (listed if isinstance(listed, dict) else {}).items():
        added[str(token.get("content") if isinstance(token, dict) else token)] = index
    other = {
        token: f"{token} = {index}"
        for token, index in added.items()
        if str(index).isdigit() and int(index) < model.vocab_size
        if str(raw.token_to_id(token)) != str(index)
    }
    if other:
        raise ConversionError(
            f"the tokenizer's added tokens {', '.join(other.values())} are not so in its "
            "tokenizer.json. Save it again with save_pretrained of transformers."
        )
    notes, plain = [], raw.encode("a", add_special_tokens=False).ids
    ids = raw.encode("a").ids
    does = {"add_bos_token": ids[:1] != plain[:1], "add_eos_token": ids[-1:] != plain[-1:]}
    for name, adds in does.items():
        if isinstance(said := config.get(name), bool) and said != adds:
            holds = f"tokenizer.json adds {'one' if adds else 'none'}, and is obeyed"
            notes.append(f"{name} is {said}, but {holds}")
    known = raw.get_vocab()
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token not in known:
            notes.append(f"{name} {token} is not in tokenizer.json and is ignored")
    return notes
