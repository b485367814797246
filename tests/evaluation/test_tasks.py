"""Tasks: reading rows, prompts and label words, metrics and their intervals."""

import dataclasses
import gzip
import json
import math

import numpy as np
import pytest

from qs_jax.errors import InputError
from qs_jax.evaluation import classification
from qs_jax.evaluation.classification import encode_examples
from qs_jax.evaluation.tasks import TASKS, Task, read_examples, split_examples
from qs_jax.testing import toy_tokenizer

RTE = [
    {"premise": "Dogs bark.", "hypothesis": "Dogs are loud.", "label": "entailment"},
    {"sentence1": "It rains.", "sentence2": "It is dry. ", "label": 1},
]
TOY = Task(
    name="toy",
    fields=(("text",), ("question",)),
    passage="text",
    template="{text}|{question}?",
    labels=("false", "true"),
)


def write(path, rows):
    content = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def toy_rows(count, passages=None):
    return [
        {"text": f"passage {i % (passages or count)}", "question": str(i), "label": bool(i % 2)}
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ["rte.jsonl", "rte.dev.jsonl", "rte.validation.jsonl.gz"])
def test_a_folder_or_a_file(tmp_path, name):
    path = write(tmp_path / name, RTE)
    for data in (tmp_path, path):
        found = read_examples(TASKS["rte"], str(data))
        assert found.labels_E.tolist() == [0, 1]
        assert found.name == name
        assert [fields["premise"] for fields in found.fields] == ["Dogs bark.", "It rains."]
    assert TASKS["rte"].prompt(found.fields[1]) == (
        "It rains.\nQuestion: It is dry. True or False?\nAnswer:"
    )


def test_labels_in_every_spelling():
    spellings = [("sst2", 1, 1), ("cola", 0, 0), ("mnli", "Neutral", 1), ("mnli", 2, 2)]
    spellings += [("qnli", "not_entailment", 1), ("boolq", True, 1), ("boolq", "false", 0)]
    for name, value, expected in spellings:
        assert TASKS[name].class_of(value) == expected
    for value in (-1, 2, "maybe", "1", None, 1.0, True):
        with pytest.raises(InputError, match=r"unknown label .*rte has entailment, not_entail"):
            TASKS["rte"].class_of(value)


BAD = {
    "empty": (b"\n", "is empty: toy needs labelled rows"),
    "list": (b"[1]\n", "line 1 is not a JSON object"),
    "torn": (b'{"text"\n', "line 1 is not JSON"),
    "table": (b"text\tquestion\tlabel\na\tb\t1\n", "line 1 is not JSON"),
    "twice": (
        b'{"text": "a", "question": "b", "label": 0, "label": 1}\n',
        "'label' is given twice",
    ),
    "half": (b'{"text": "\\ud800", "question": "b", "label": 0}\n', "surrogates not allowed"),
    "field": (b'\n{"text": "a", "label": 1}\n', 'line 2 has no field "question"'),
    "label": (b'{"text": "a", "question": "b"}\n', 'has no field "label"'),
    "hidden": (b'{"text": "a", "question": "b", "label": -1}\n', "line 1: unknown label -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(tmp_path, case):
    content, message = BAD[case]
    (tmp_path / "toy.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_examples(TOY, str(tmp_path / "toy.jsonl"))


def test_bad_places(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_examples(TASKS["rte"], str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"one file of rte, such as rte\.dev\.jsonl; it has none"):
        read_examples(TASKS["rte"], str(tmp_path))
    write(tmp_path / "rte.jsonl", RTE)
    write(tmp_path / "rte.dev.jsonl", RTE)
    with pytest.raises(InputError, match=r"it has rte\.dev\.jsonl, rte\.jsonl"):
        read_examples(TASKS["rte"], str(tmp_path))


def test_a_limit_draws_rows(tmp_path):
    path = str(write(tmp_path / "toy.jsonl", toy_rows(40)))
    whole = read_examples(TOY, path)
    drawn = [read_examples(TOY, path, limit=10, seed=seed) for seed in (0, 0, 1)]
    numbers = [[int(fields["question"]) for fields in part.fields] for part in drawn]
    assert numbers[0] == numbers[1] == sorted(set(numbers[0]))
    assert numbers[0] != numbers[2]
    assert max(numbers[0]) > 10, "not the first rows"
    assert drawn[0].available == 40
    assert drawn[0].describe() == drawn[1].describe()
    assert drawn[0].describe()["sha256"] != whole.describe()["sha256"]
    assert read_examples(TOY, path, limit=99).describe() == whole.describe()
    with pytest.raises(InputError, match="--limit must be at least 1"):
        read_examples(TOY, path, limit=0)


def test_rows_of_the_hub_go_through_datasets(tmp_path, monkeypatch):
    """A folder laid out as the hub lays it out, read by the real library."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [row | {"label": index, "idx": index} for index, row in enumerate([RTE[0], RTE[0]])]
    (tmp_path / "glue").mkdir()
    write(tmp_path / "glue" / "rows.jsonl", rows)
    (tmp_path / "glue" / "README.md").write_text(
        "---\nconfigs:\n- config_name: rte\n  data_files:\n  - split: validation\n"
        "    path: rows.jsonl\n---\n"
    )
    task = dataclasses.replace(TASKS["rte"], hub=str(tmp_path / "glue"))
    found = read_examples(task, "hub")
    assert found.labels_E.tolist() == [0, 1]
    assert found.fields[0] == {k: RTE[0][k] for k in ("premise", "hypothesis")}
    absent = dataclasses.replace(task, split="test")
    with pytest.raises(InputError, match="could not be read from the Hugging Face Hub"):
        read_examples(absent, "hub")


def test_a_split_shares_no_passage(tmp_path):
    whole = read_examples(TOY, str(write(tmp_path / "toy.jsonl", toy_rows(120, passages=30))))
    train, test = split_examples(TOY, whole, 0.5)
    passages = [{fields["text"] for fields in part.fields} for part in (train, test)]
    assert not passages[0] & passages[1]
    assert len(train.fields) + len(test.fields) == 120
    assert 30 < len(train.fields) < 90
    assert split_examples(TOY, whole, 0.5, seed=1)[0].fields != train.fields
    with pytest.raises(InputError, match="leaves a part without some class"):
        split_examples(TOY, whole.take(np.arange(2)), 0.5)
    with pytest.raises(InputError, match="--train-share"):
        split_examples(TOY, whole, 1.0)


def test_the_end_of_a_long_passage_is_cut(tmp_path):
    rows = [
        {"text": "short", "question": "why", "label": 0},
        {"text": "abcdefghijklmnop", "question": "who", "label": 1},
    ]
    examples = read_examples(TOY, str(write(tmp_path / "toy.jsonl", rows)))
    tokenizer = toy_tokenizer()
    encoded, cut = encode_examples(TOY, examples, tokenizer, 12)
    assert cut == 1
    assert [tokenizer.decode(row) for row in encoded] == ["short|why?", "abcdefg|who?"]
    assert encode_examples(TOY, examples, tokenizer, 99)[1] == 0
    with pytest.raises(InputError, match=r"example 0 has 5 tokens without .* room for 1 to 4"):
        encode_examples(TOY, examples, tokenizer, 4)
    pairs, _ = encode_examples(TOY, examples, tokenizer, 99, bare=True)
    assert tokenizer.decode(pairs[0]) == "shortwhy"


def test_metrics_by_hand():
    y, p = np.array([1, 1, 1, 0, 0, 0, 0, 1]), np.array([1, 1, 0, 0, 0, 0, 1, 1])
    # TP 3, TN 3, FP 1, FN 1.
    assert classification.matthews(y, p) == pytest.approx((9 - 1) / math.sqrt(4**4))
    assert classification.matthews(y, np.ones(8, int)) == 0
    assert classification.measure("matthews", y, np.ones(8, int))["interval"] == [0, 0]
    found = classification.measure("accuracy", np.zeros(50, int), np.repeat([0, 1], [40, 10]))
    z, n, share = 1.959964, 50, 0.8  # Wilson's interval
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    assert found["value"] == pytest.approx(share)
    assert found["interval"] == pytest.approx([middle - half, middle + half], rel=1e-5)


def test_a_paired_difference():
    rng = np.random.default_rng(1)
    y = np.zeros(2000, int)
    dense = (rng.random(2000) < 0.3).astype(int)
    other = np.where(rng.random(2000) < 0.1, 1 - dense, dense)
    found = classification.compare("accuracy", y, dense, other)
    change = (other == y).astype(float) - (dense == y)
    half = 1.96 * change.std() / math.sqrt(2000)
    assert found["value"] == pytest.approx(change.mean())
    assert found["interval"] == pytest.approx(
        [change.mean() - half, change.mean() + half], abs=0.15 * half
    )
    b, c = (change < 0).sum(), (change > 0).sum()
    assert (found["only_dense_right"], found["only_other_right"]) == (b, c)
    exact = sum(math.comb(int(b + c), k) for k in range(min(b, c) + 1)) / 2 ** int(b + c)
    assert found["mcnemar_p"] == pytest.approx(min(1, 2 * exact))
    same = classification.compare("accuracy", y, dense, dense)
    assert (same["value"], same["interval"], same["mcnemar_p"]) == (0, [0, 0], 1)
    assert classification.compare("accuracy", y[:1], dense[:1], other[:1])["interval"] is None


def test_the_research_data(research_data):
    """Rows and class counts of the data's own description."""
    expected = {
        **{"sst2": [212, 224], "cola": [159, 363], "rte": [68, 71], "qnli": [1344, 1388]},
        **{"mnli": [1732, 1572, 1604], "boolq": [648, 987]},
    }
    for name, counts in expected.items():
        examples = read_examples(TASKS[name], str(research_data / "glue"))
        assert np.bincount(examples.labels_E).tolist() == counts
