"""What every token did at every layer, as one HTML file and as figures (paper Q, figures 2 to 22).

`trace` runs a text under the combinations of a preset's mechanisms, `Report` gathers what is known,
`write` makes the page, and `figures.save` draws the same for papers (extra `plots`).
"""

from qs_jax.report.content import PresetRuns, Report, TextRuns, to_json
from qs_jax.report.files import read_front, read_results
from qs_jax.report.page import render, write
from qs_jax.report.tokens import labels
from qs_jax.report.trace import Run, trace

__all__ = [
    "PresetRuns",
    "Report",
    "Run",
    "TextRuns",
    "labels",
    "read_front",
    "read_results",
    "render",
    "to_json",
    "trace",
    "write",
]
