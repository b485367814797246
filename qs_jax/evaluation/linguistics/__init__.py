"""What the mechanisms do to words: parts of speech, constituents, predictions (paper L, M, N)."""

from qs_jax.evaluation.linguistics.align import Aligned, align
from qs_jax.evaluation.linguistics.measures import (
    fusion_by_layer,
    halting_by_class,
    prediction_change,
)
from qs_jax.evaluation.linguistics.observe import Observed, observe, together
from qs_jax.evaluation.linguistics.spacy_tags import tag_text
from qs_jax.evaluation.linguistics.spans import Phrase, Sentence, TaggedText, written
from qs_jax.evaluation.linguistics.study import describe, study
from qs_jax.evaluation.linguistics.treebank import read_treebank

__all__ = [
    # Reading
    "read_treebank",
    "tag_text",
    "written",
    "Phrase",
    "Sentence",
    "TaggedText",
    # Tokens and words
    "align",
    "Aligned",
    # Running
    "observe",
    "together",
    "Observed",
    # Measuring
    "describe",
    "study",
    "halting_by_class",
    "fusion_by_layer",
    "prediction_change",
]
