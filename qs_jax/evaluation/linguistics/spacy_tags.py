"""Tags for any text, from spaCy and a model of its own that the user installs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qs_jax.errors import InputError
from qs_jax.evaluation.datasets import read_text
from qs_jax.evaluation.linguistics.spans import TaggedText
from qs_jax.evaluation.linguistics.tags import from_ud

MODEL = "en_core_web_sm"
_UNUSED = ("parser", "ner", "lemmatizer")


def load_tagger(model: str = MODEL) -> Any:
    """A spaCy pipeline that tags.

    Raises:
      InputError: spaCy or the model is not installed.
    """
    try:
        import spacy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            "tagging a text of your own needs spaCy: pip install spacy, then python -m spacy "
            f"download {model}."
        ) from error
    try:
        return spacy.load(model, exclude=list(_UNUSED))
    except OSError as error:
        raise InputError(
            f"spaCy's model {model} is not installed: python -m spacy download {model}."
        ) from error


def tag_text(path: str | Path, model: str = MODEL) -> TaggedText:
    """Read a text and tag it with spaCy (the paper's tagger, M).

    Args:
      path: As `qs_jax.evaluation.read_text`.
      model: Name of an English spaCy model with Penn Treebank tags.

    Raises:
      InputError: As `read_text` and `load_tagger`; or the text has no words.
    """
    text = read_text(str(path))
    return tagged(text.text, load_tagger(model), text.name)


def tagged(text: str, pipeline: Any, name: str) -> TaggedText:
    """Tag a text line by line.

    Args:
      text: Any.
      pipeline: Of `load_tagger`: each token has `idx`, `tag_`, `pos_` and `is_space`.
      name: For messages and results.

    Raises:
      InputError: The text has no words.
    """
    starts, ends, tags, universal = [], [], [], []
    at = 0
    lines = text.split("\n")
    for line, doc in zip(lines, pipeline.pipe(lines), strict=True):
        words = [token for token in doc if not token.is_space]
        starts += [at + token.idx for token in words]
        ends += [at + token.idx + len(token.text) for token in words]
        tags += [token.tag_ for token in words]
        universal += [from_ud(token.pos_) for token in words]
        at += len(line) + 1
    if not tags:
        raise InputError(f"{name} holds no words.")
    return TaggedText(
        name=name,
        text=text,
        starts_W=np.array(starts, np.int64),
        ends_W=np.array(ends, np.int64),
        tags=tuple(tags),
        universal=tuple(universal),
        phrases=None,
        tag_set="penn",
    )
