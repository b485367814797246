"""Classes of words: the paper's six categories, and the 12 universal tags.

The paper's Tables 2 and 12 name Penn Treebank tags; they are taken at their word. "Auxiliary Verbs
(MD, VBZ, VBP)" therefore holds every verb in the present tense, main verbs too; `AUXILIARY` is the
part of it that are auxiliaries. Brown tags be, have and do apart, in every form, and has no tag for
other verbs in the present plural: they count as content words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qs_jax.errors import InputError

UNIVERSAL = ("NOUN", "VERB", "ADJ", "ADV", "PRON", "DET", "ADP", "CONJ", "PRT", "NUM", "X", ".")
CATEGORIES = (
    "Determiners (DT)",
    "Prepositions (IN)",
    "Conjunctions (CC)",
    "Pronouns (PRP, PRP$)",
    "Auxiliary verbs (MD, VBZ, VBP)",
    "Content words (NN, VB, JJ, RB)",
)
FUNCTION, CONTENT, OTHER = "Function words", "Content words", "Other"
AUXILIARY = "Auxiliary verbs: modals and forms of be, have, do"
_EXACT = {"DT": 0, "IN": 1, "CC": 2, "PRP": 3, "PRP$": 3, "MD": 4, "VBZ": 4, "VBP": 4}
# Families of tags: NN is also NNS, NNP and NNPS.
_CONTENT = re.compile(r"(NN|VB|JJ|RB)[A-Z$]*")
_BROWN = {
    0: r"AT|DT|DTI|DTS|DTX",
    1: r"IN|CS",
    2: r"CC",
    3: r"PP\$\$?|PPL|PPLS|PPO|PPS|PPSS",
    4: r"MD|BE[A-Z]*|DO[A-Z]*|HV[A-Z]*|VBZ",
    5: r"(N[NPR]|VB|JJ|RB)[A-Z$]*",
}
# Of be, have and do: their forms in the present, contracted and after "ai n't" too.
_AUXILIARIES = frozenset("am is are 'm 's 're ai has have 've does do".split())
_BROWN_AUXILIARY = re.compile(r"MD|BE[A-Z]*|DO[A-Z]*|HV[A-Z]*")
# Parts of speech of Universal Dependencies that the 12 universal tags name otherwise.
_UD = {
    **{"PROPN": "NOUN", "AUX": "VERB", "CCONJ": "CONJ", "SCONJ": "ADP", "PART": "PRT"},
    **{"INTJ": "X", "PUNCT": ".", "SYM": ".", "SPACE": "X"},
}


def category(tag: str, tag_set: str = "penn") -> str:
    """The paper's category of a tag, or `OTHER` (punctuation, numbers, particles and the like).

    Args:
      tag: Of the Penn Treebank, alternatives ("NN|VBG") read as the first; or of Brown.
      tag_set: "penn" or "brown".
    """
    if tag_set == "brown":
        stem = _brown_stem(tag)
        found = next((i for i, tags in _BROWN.items() if re.fullmatch(tags, stem)), None)
        return OTHER if found is None else CATEGORIES[found]
    tag = tag.split("|")[0]
    if tag in _EXACT:
        return CATEGORIES[_EXACT[tag]]
    return CATEGORIES[5] if _CONTENT.fullmatch(tag) else OTHER


def is_auxiliary(word: str, tag: str, tag_set: str = "penn") -> bool:
    """Whether a word of the fifth category is a modal or a form of be, have or do."""
    if category(tag, tag_set) != CATEGORIES[4]:
        return False
    if tag_set == "brown":
        return _BROWN_AUXILIARY.fullmatch(_brown_stem(tag)) is not None
    return tag == "MD" or word.lower().replace("\u2019", "'") in _AUXILIARIES


def side(word: str, tag: str, tag_set: str = "penn") -> str:
    """`FUNCTION`, `CONTENT` or `OTHER`: the paper's split (2.1, L).

    Function words are determiners, prepositions, conjunctions, pronouns and auxiliaries; content
    words are nouns, adjectives, adverbs and all other verbs.
    """
    name = category(tag, tag_set)
    if name == OTHER:
        return OTHER
    if name == CATEGORIES[5]:
        return CONTENT
    main_verb = name == CATEGORIES[4] and not is_auxiliary(word, tag, tag_set)
    return CONTENT if main_verb else FUNCTION


def _brown_stem(tag: str) -> str:
    """A Brown tag without its suffixes: "PPSS+BEM-TL" is "PPSS", "MD*" is "MD"."""
    return re.split(r"[-+*]", tag.upper())[0] or tag


def from_ud(tag: str) -> str:
    """The universal tag of a part of speech of Universal Dependencies, as spaCy gives it."""
    return _UD.get(tag, tag if tag in UNIVERSAL else "X")


def read_map(path: Path) -> dict[str, str]:
    """Read a tag map: a tag and its universal tag on each line, a tab between them.

    Raises:
      InputError: The file cannot be read, is empty, or a line is no such pair.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the tag map {path} cannot be read: {error}.") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        tag, _, universal = line.partition("\t")
        if universal.strip() not in UNIVERSAL:
            raise InputError(
                f"{path}, line {number}: expected a tag, a tab and one of {' '.join(UNIVERSAL)}, "
                f"got {line!r}."
            )
        found[tag.strip()] = universal.strip()
    if not found:
        raise InputError(f"the tag map {path} is empty.")
    return found


def universal_tags(
    words: Sequence[str], tags: Sequence[str], tag_map: Mapping[str, str], source: str
) -> list[str]:
    """Universal tag of each word.

    Args:
      words: Of one sentence, for the message.
      tags: One each. Brown's are looked up in capitals, the map's spelling.
      tag_map: From `read_map`.
      source: File and sentence.

    Raises:
      InputError: A tag the map does not have, with word, sentence and file.
    """
    found = []
    for word, tag in zip(words, tags, strict=True):
        universal = tag_map.get(tag) or tag_map.get(tag.upper())
        if universal is None:
            raise InputError(
                f"{source}: the tag {tag!r} of {word!r} is not in the tag map; correct the file or "
                "give another --tag-map."
            )
        found.append(universal)
    return found
