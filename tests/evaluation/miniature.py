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

TAG_MAP = """\
DT\tDET
JJ\tADJ
NN\tNOUN
NNP\tNOUN
VBZ\tVERB
VBD\tVERB
VB\tVERB
MD\tVERB
RB\tADV
IN\tADP
PRP\tPRON
CD\tNUM
.\t.
,\t.
``\t.
''\t.
-LRB-\t.
-RRB-\t.
"""
BROWN = """
\tThe/at dog/nn can't/md* bark/vb ``/`` now/rb ''/'' ./.


\tHe's/pps+bez fine/jj-tl ;/. ;/.
"""
BROWN_MAP = "AT\tDET\nNN\tNOUN\nMD*\tVERB\nVB\tVERB\nRB\tADV\nPPS+BEZ\tPRT\nJJ-TL\tADJ\n"
BROWN_MAP += ".\t.\n``\t.\n''\t.\n"


def write_maps(folder: Path) -> None:
    (folder / "universal_tagset").mkdir(exist_ok=True)
    (folder / "universal_tagset" / "en-ptb.map").write_text(TAG_MAP)
    (folder / "universal_tagset" / "en-brown.map").write_text(BROWN_MAP)


def write_zip(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def write_treebank(folder: Path) -> Path:
    """The Penn miniature as a zip file, tag maps beside it."""
    write_maps(folder)
    files = {"mini/combined/one.mrg": ONE, "mini/combined/two.mrg": TWO, "mini/README": "Ours."}
    return write_zip(folder / "mini.zip", files)
