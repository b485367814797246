"""Texts by name and from files; what cannot be read is refused in one line."""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import pytest

from qs_jax.commands.calibrate import Calibrate
from qs_jax.errors import InputError
from qs_jax.evaluation.datasets import read_stdin, read_text, read_text_or_file
from qs_jax.evaluation.tasks import TASKS, read_examples
from qs_jax.testing import toy_tokenizer

DOCUMENTS = ["one document", "another, a little longer", "the third", "and the last of them"]


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves `DOCUMENTS`, and lists what it was asked for."""
    asked = []

    def load_dataset(repo, config, *, split, streaming=False):
        asked.append((repo, config, split, streaming))
        rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def refused(data, **options):
    with pytest.raises(InputError) as caught:
        read_text(str(data), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wikitext_is_joined_as_the_hugging_face_recipe_does(hub):
    text = read_text("wikitext-103")
    assert hub == [("Salesforce/wikitext", "wikitext-103-raw-v1", "validation", False)]
    assert (text.name, text.text) == ("wikitext-103", "\n\n".join(DOCUMENTS))
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert text.documents == 4


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (12, 1), (13, 2), (1000, 4)])
def test_c4_takes_as_many_documents_as_it_takes(hub, limit, count):
    assert "--limit-windows" in refused("c4")
    assert hub == []
    text = read_text("c4", limit)
    assert hub == [("allenai/c4", "en", "validation", True)]
    assert text.text == "\n\n".join(DOCUMENTS[:count])
    assert text.documents == count


@pytest.mark.slow
def test_without_the_extra_names_are_refused_and_everything_else_works(tiny_checkpoint, tmp_path):
    """In a process in which `datasets` cannot be imported."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog")
    script = f"""
import sys
sys.modules["datasets"] = None
import qs_jax, convert.hf_to_flax
from qs_jax.evaluation import evaluate, read_text, read_windows
params, model = qs_jax.load({str(tiny_checkpoint)!r})
tokenizer = qs_jax.load_tokenizer({str(tiny_checkpoint)!r})
_, windows = read_windows({str(tmp_path / "text.txt")!r}, tokenizer, 16)
assert evaluate(params, windows, qs_jax.Config(model))["windows"] == 2
read_text("wikitext-103")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "InputError: Salesforce/wikitext is read with datasets: pip install" in done.stderr
    assert "'qs-jax[data]'" in done.stderr


def broken(*args, **options):
    raise ConnectionError("no route\nto the hub")


def breaks_later(*args, **options):
    def rows():
        yield {"text": "first"}
        broken()

    return datasets.IterableDataset.from_generator(rows)


@pytest.mark.parametrize("load_dataset", [broken, breaks_later])
@pytest.mark.parametrize("name", ["wikitext-103", "c4"])
def test_a_hub_out_of_reach(monkeypatch, name, load_dataset):
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refused(name, limit_chars=100)
    assert "could not be read from the Hugging Face Hub (ConnectionError: no route)" in message
    assert "give a local file" in message


@pytest.mark.parametrize("name", ["a.txt", "b.txt.gz"])
def test_a_text_file_is_read_as_it_stands(tmp_path, name):
    content = "Ein Satz.\r\nNoch einer: \u00e4\u2028\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    text = read_text(str(tmp_path / name))
    assert (text.name, text.text.encode()) == (name, content)
    assert text.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_mark_before_the_text_is_not_read(tmp_path, name):
    """Nor is the seam of two gzip members."""
    text = "\u00e4b" if "txt" in name else '{"text": "\u00e4b"}'
    one, two = text.encode("utf-8-sig")[:5], text.encode("utf-8-sig")[5:]
    packed = gzip.compress(one) + gzip.compress(two)
    (tmp_path / name).write_bytes(packed if name.endswith("gz") else one + two)
    assert read_text(str(tmp_path / name)).text == "\u00e4b"


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL.gz", "c4-validation.json", "c4.json.gz"])
def test_lines_of_json(tmp_path, name):
    lines = [json.dumps({"text": document, "url": "x"}) for document in [*DOCUMENTS, "\u2028"]]
    content = ("\r\n".join(lines) + "\n\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    text = read_text(str(tmp_path / name))
    assert text.text == "\n\n".join([*DOCUMENTS, "\u2028"])
    assert text.documents == 5


BAD_FILES = {
    "empty.txt": (b"", "empty.txt is empty"),
    "latin.txt": ("na\u00efve".encode("latin-1"), "0xef in position 2"),
    "no.jsonl": (b"\n", "no.jsonl is empty"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "other.jsonl": (b'{"content": "a"}\n', 'line 1 has no "text" field'),
    "number.jsonl": (b'{"text": 3}\n', 'line 1 has no "text" field'),
    "list.jsonl": (b"[1]\n", 'line 1 has no "text" field'),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "surrogate"),
    "bytes.jsonl": (b'{"text": "\xff"}\n', "not UTF-8"),
    "utf16.txt": ("text".encode("utf-16"), "utf16.txt is UTF-16 text"),
    "unmarked.txt": ("text".encode("utf-16-le"), "unmarked.txt holds null bytes"),
    "blank.txt": (b" \n\t", "blank.txt is empty or blank"),
    "blanks.jsonl": (b'{"text": ""}\n{"text": " "}\n', "blanks.jsonl is empty or blank"),
    "twice.jsonl": (
        b'{"text": "a", "text": "b"}\n',
        "line 1 is not JSON: 'text' is given twice",
    ),
    "inner.jsonl": (b'{"text": "a", "b": {"c": 1, "c": 1}}\n', "'c' is given twice"),
    "nan.jsonl": (b'{"text": "a", "score": NaN}\n', "NaN is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "line 1 is not JSON: it is nested too deep"),
    "array.json": (b'[\n{"text": "a"}]', "array.json, line 1 is not JSON"),
    "plain.txt.gz": (b"not packed", "not a whole gzip file"),
    "torn.txt.gz": (gzip.compress(b"some text" * 99)[:-9], "not a whole gzip file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    assert message in refused(tmp_path / name)
    assert "is a folder" in refused(tmp_path)
    assert "known names are wikitext-103, c4" in refused("wikitext-2")


@pytest.mark.parametrize("make", ["mkdir", "touch"])
def test_names_that_are_files_too(tmp_path, monkeypatch, hub, make):
    monkeypatch.chdir(tmp_path)
    for name in ("c4", "hub"):
        getattr(Path(name), make)()
    assert "write ./c4 for the file or folder" in refused("c4", limit_chars=100)
    with pytest.raises(InputError, match=r"write \./hub for the file or folder"):
        read_examples(TASKS["rte"], "hub")
    assert hub == []
    if make == "touch":
        Path("c4").write_text("mine")
        assert read_text("./c4").text == "mine"
        assert read_text_or_file("c4").text == "mine"


def test_a_text_or_the_name_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("of the file")
    Path("lines.jsonl").write_text('{"text": "of the line"}')
    Path("plain").write_text("of the plain one")
    Path("folder").mkdir()
    files = {"a.txt": "of the file", "./a.txt": "of the file", str(tmp_path / "plain"): None}
    files |= {"plain": "of the plain one", "lines.jsonl": "of the line"}
    for name, text in files.items():
        assert read_text_or_file(name).text == (text or "of the plain one")
    texts = ["two words", "word", "c4", "It costs 3.50 today.", "and so on ...", "a/b or c.d ends"]
    for text in [*texts, "first\nb.txt", "a" * 5000, "null \0", "see a.docx"]:
        assert read_text_or_file(text).text == text
    names = [
        "b.txt",
        "a.tx",
        "data/b",
        "C:\\b.docx",
        "my long name.txt",
        "notes of may.JSONL",
        "x.gz",
    ]
    for name in names:
        with pytest.raises(InputError, match="the name of a file, and there is none"):
            read_text_or_file(name)
    for value, message in (
        ("folder", "folder is a folder: give a file"),
        (".", "is a folder"),
        ("", "is empty or blank"),
        ("a \udcff", "surrogate"),
    ):
        with pytest.raises(InputError, match=message):
            read_text_or_file(value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: it is closed"),
        ("closed", "cannot be read: I/O operation on closed file"),
        (b"", "is empty"),
        (b"a\xff", "is not UTF-8"),
        (b"\xef\xbb\xbfall of it\n", None),
    ],
)
def test_standard_input(monkeypatch, content, message):
    given = content if isinstance(content, bytes) else b""
    stdin = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
    if content == "closed":
        stdin.close()
    monkeypatch.setattr(sys, "stdin", None if content is None else stdin)
    if message is None:
        assert read_text_or_file("-").text == "all of it\n"
        return
    with pytest.raises(InputError, match=f"standard input {message}"):
        read_stdin()


def test_texts_of_one_name_are_both_read(tmp_path):
    """As --data and --fit-data; `./c4` stays the name of a file."""
    (tmp_path / "c4").write_text("abcd" * 2)
    command = types.SimpleNamespace(seq_len=(4,))
    paths = [str(tmp_path / "c4")]
    found = Calibrate._read_more(command, paths, toy_tokenizer(), texts={"c4": np.zeros((1, 4))})
    assert {name: len(windows) for name, windows in found.items()} == {"c4": 1, paths[0]: 2}
