"""The words of each token, by hand."""

import numpy as np
import pytest

from benchmarks.linguistics.align import NO_WORD, SEVERAL, Aligned, Touched, align, touched_words
from benchmarks.linguistics.treebank import read_treebank
from qs_jax.errors import InputError
from qs_jax.testing import toy_tokenizer
from tests.benchmarks.linguistics.miniature import WORDS, write_treebank


def test_classes_of_tokens(tmp_path):
    """Characters as tokens, then hand-made tokens over several words."""
    text = read_treebank(write_treebank(tmp_path))
    offsets = [(0, 3), (3, 7), (7, 8), (4, 11), (12, 16), (16, 19), (14, 19), (0, 0), (31, 34)]
    first, last = touched_words(np.array(offsets), text)
    touched = [" ".join(text.words[a : b + 1]) for a, b in zip(first, last, strict=True)]
    assert touched == ["The", "old", "", "old dog", "does", "n't", "does n't", "", '" Run']
    aligned = align(text, toy_tokenizer(), 8, 2)
    assert aligned.windows.tokens_WT.shape == (2, 8)
    labels = [str(number) for number in range(len(WORDS))]
    assert aligned.classify(labels).tolist() == [
        ["0", "0", "0", NO_WORD, "1", "1", "1", NO_WORD],
        ["2", "2", "2", NO_WORD, "3", "3", "3", "3"],
    ]
    made = Aligned(text, aligned.windows, Touched(first[None], last[None]))
    got = made.classify(text.tags)[0].tolist()
    assert got == ["DT", "JJ", NO_WORD, SEVERAL, "VBZ", "RB", SEVERAL, NO_WORD, SEVERAL]
    assert made.classify(["same"] * len(WORDS))[0].tolist()[3] == "same"

    def lossy(*args, **options):
        return {"input_ids": [1, 2], "offset_mapping": [(0, 1), (1, 2)]}

    with pytest.raises(InputError, match=r"no token for \d+ words: 'old'"):
        align(text, lossy, 4)
