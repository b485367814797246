"""Token rows: their checks, their padding and the buckets they are rounded up to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qs_jax.engine.inputs import bucket_size, make_batch
from qs_jax.errors import InputError
from qs_jax.testing import tiny_model

MODEL = tiny_model()


@given(st.integers(1, 100_000))
def test_buckets_hold_what_they_must_and_waste_at_most_a_quarter(n):
    size = bucket_size(n)
    assert n <= size <= max(16, n * 1.25)
    assert bucket_size(size) == size
    assert bucket_size(n) <= bucket_size(n + 1)


def test_buckets_are_few_and_stop_at_the_limit():
    assert len({bucket_size(n) for n in range(1, 4097)}) == 1 + 4 * 8
    assert bucket_size(1000, limit=1000) == 1000
    assert bucket_size(9, limit=1000) == 16


@given(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=20), min_size=1, max_size=5))
def test_lists_lengths_and_masks_say_the_same(rows):
    width = max(map(len, rows))
    padded = np.zeros((len(rows), width), int)
    left, left_mask = padded.copy(), np.zeros((len(rows), width), int)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
        left[index, width - len(row) :] = row
        left_mask[index, width - len(row) :] = 1
    lengths = [len(row) for row in rows]
    expected = make_batch(rows, MODEL)
    for same in (
        make_batch(padded, MODEL, lengths=lengths),
        make_batch(left, MODEL, attention_mask=left_mask),
        make_batch(padded, MODEL, attention_mask=np.arange(width) < np.array(lengths)[:, None]),
    ):
        np.testing.assert_array_equal(same.tokens_BT, expected.tokens_BT)
        np.testing.assert_array_equal(same.lengths_B, expected.lengths_B)
    np.testing.assert_array_equal(expected.lengths_B, lengths)


def test_one_row_is_a_batch_of_one():
    assert make_batch([1, 2, 3], MODEL, lengths=2).tokens_BT.tolist() == [[1, 2]]
    assert make_batch([1, 2, 3], MODEL, attention_mask=[0, 1, 1]).tokens_BT.tolist() == [[2, 3]]
    assert make_batch([1, 2, 3], MODEL).tokens_BT.tolist() == [[1, 2, 3]]
    assert make_batch(np.array([1, 2, 3]), MODEL).tokens_BT.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[1, 2], []], {}, "row 1 is empty"),
        ([], {}, "no rows"),
        (np.zeros((0, 4), int), {}, "no rows"),
        (np.zeros((2, 0), int), {}, "row 0 is empty"),
        ([[1, 97]], {}, "token id 97, outside the vocabulary of 97"),
        ([[1, -1]], {}, "token id -1"),
        ([[1.5, 2.0]], {}, "must be integers"),
        (np.zeros((1, 2, 3), int), {}, r"must be \[B, T\]"),
        ([1, [2, 3]], {}, "not a regular array"),
        (None, {}, "must be"),
        (5, {}, "must be"),
        ([[1, 2]], {"attention_mask": [[1], [1, 1]]}, "attention_mask is not a regular array"),
        ([[1, 2, 3]], {"lengths": [4]}, "lengths\\[0\\] is 4"),
        ([[1, 2, 3]], {"lengths": [0]}, "row 0 is empty"),
        ([[1, 2, 3]], {"lengths": [1, 2]}, "must be 1 integers"),
        ([[1, 2, 3]], {"attention_mask": [[1, 0, 1]]}, "hole"),
        ([[1, 2, 3]], {"attention_mask": [[0, 0, 0]]}, "row 0 is empty"),
        ([[1, 2, 3]], {"attention_mask": [[1, 1]]}, "does not match"),
        ([[1, 2, 3]], {"attention_mask": [[1, 1, 1]], "lengths": [3]}, "not both"),
    ],
)
def test_unusable_input_is_refused_by_name(tokens, options, message):
    with pytest.raises(InputError, match=message):
        make_batch(tokens, MODEL, **options)
