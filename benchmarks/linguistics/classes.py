"""Classes of words: the paper's six categories, and function against content words.

The paper's Tables 2 and 12 name Penn Treebank tags; they are taken at their word. "Auxiliary Verbs
(MD, VBZ, VBP)" therefore holds every verb in the present tense, main verbs too.
"""

from __future__ import annotations

import re

CATEGORIES = (
    "Determiners (DT)",
    "Prepositions (IN)",
    "Conjunctions (CC)",
    "Pronouns (PRP, PRP$)",
    "Auxiliary verbs (MD, VBZ, VBP)",
    "Content words (NN, VB, JJ, RB)",
)
FUNCTION, CONTENT, OTHER = "Function words", "Content words", "Other"
_EXACT = {"DT": 0, "IN": 1, "CC": 2, "PRP": 3, "PRP$": 3, "MD": 4, "VBZ": 4, "VBP": 4}
# Families of tags: NN is also NNS, NNP and NNPS.
_CONTENT = re.compile(r"(NN|VB|JJ|RB)[A-Z$]*")
# Of be, have and do: their forms in the present, contracted and after "ai n't" too.
_AUXILIARIES = frozenset("am is are 'm 's 're ai has have 've does do".split())


def category(tag: str) -> str:
    """The paper's category of a tag, or `OTHER` (punctuation, numbers, particles and the like).

    Args:
      tag: Of the Penn Treebank; alternatives ("NN|VBG") are read as the first.
    """
    tag = tag.split("|")[0]
    if tag in _EXACT:
        return CATEGORIES[_EXACT[tag]]
    return CATEGORIES[5] if _CONTENT.fullmatch(tag) else OTHER


def is_auxiliary(word: str, tag: str) -> bool:
    """Whether a word of the fifth category is a modal or a form of be, have or do."""
    word = word.lower().replace("\u2019", "'")
    return category(tag) == CATEGORIES[4] and (tag == "MD" or word in _AUXILIARIES)


def side(word: str, tag: str) -> str:
    """`FUNCTION`, `CONTENT` or `OTHER`: the paper's split (2.1, L).

    Function words are determiners, prepositions, conjunctions, pronouns and auxiliaries; content
    words are nouns, adjectives, adverbs and all other verbs.
    """
    name = category(tag)
    if name == OTHER:
        return OTHER
    main_verb = name == CATEGORIES[4] and not is_auxiliary(word, tag)
    return CONTENT if main_verb or name == CATEGORIES[5] else FUNCTION
