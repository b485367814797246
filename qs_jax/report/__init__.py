"""What every token did at every layer, as one HTML file and as figures (paper Q, figures 2 to 22).

`trace` runs a text under the combinations of a preset's mechanisms, `Report` gathers the runs with
results of other commands, `write` makes the page, and `figures.save` draws figures for papers.
"""

from qs_jax.report.content import PresetRuns, Report, TextRuns, render, to_json, write
from qs_jax.report.measures import read_front, read_results
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
