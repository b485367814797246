"""A treebank of our own: two documents, three sentences, and what is true of them by hand."""

import zipfile
from pathlib import Path

ONE = """
( (S
    (NP-SBJ-1 (DT The) (JJ old) (NN dog) )
    (VP (VBZ does) (RB n't)
      (VP (VB bark)
        (PP-LOC (IN at) (NP (PRP me) ))))
    (. .) ))
( (S (`` ``)
    (S (NP-SBJ (-NONE- *) ) (VP (VB Run) ))
    (, ,) ('' '')
    (NP-SBJ (PRP she) )
    (VP (VBD said) (SBAR (-NONE- 0) (S (-NONE- *T*-1) )))
    (PRN (-LRB- -LRB-) (NP (CD 1\\/2) (NN mile) ) (-RRB- -RRB-) )
    (. .) ))
"""
TWO = "( (S (NP (PRP I)) (VP (MD can) (RB not) (VP (VB see) (NP (DT the) (NNP U.S.)))) (. .)))\n"

TEXT = 'The old dog doesn\'t bark at me. "Run," she said (1/2 mile).\n\nI cannot see the U.S.'
WORDS = [
    *["The", "old", "dog", "does", "n't", "bark", "at", "me", "."],
    *['"', "Run", ",", '"', "she", "said", "(", "1/2", "mile", ")", "."],
    *["I", "can", "not", "see", "the", "U.S", "."],
]
TAGS = [
    *["DT", "JJ", "NN", "VBZ", "RB", "VB", "IN", "PRP", "."],
    *["``", "VB", ",", "''", "PRP", "VBD", "-LRB-", "CD", "NN", "-RRB-", "."],
    *["PRP", "MD", "RB", "VB", "DT", "NNP", "."],
]
# Of the first sentence, by hand: label, first word, one past the last, outer before inner.
PHRASES = [("S", 0, 9), ("NP", 0, 3), ("VP", 3, 8), ("VP", 5, 8), ("PP", 6, 8), ("NP", 7, 8)]


def write_treebank(folder: Path) -> Path:
    """The miniature as a zip file."""
    with zipfile.ZipFile(folder / "mini.zip", "w") as archive:
        for name, content in (("combined/one.mrg", ONE), ("combined/two.mrg", TWO), ("README", "")):
            archive.writestr(f"mini/{name}", content)
    return folder / "mini.zip"
