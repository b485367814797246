"""Pictures of the docs: SVG files that a page shows in its own light or dark colours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qs_jax.files import write_whole
from qs_jax.report.figures import BLUE, GREEN, ORANGE, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that are told apart by the colour-blind, on white and on dark grey.
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
FOLDER = Path("docs/images")
# Lines and text are drawn in the first colour; browsers in dark mode show the second.
INK, INK_ON_DARK = "#30363d", "#d0d7de"
_DARK = "".join(
    f'[style*="{part}: {INK}"]{{{part}:{INK_ON_DARK}!important}}' for part in ("fill", "stroke")
)
_STYLE = f"<style>@media (prefers-color-scheme:dark){{{_DARK}}}</style>"


@contextmanager
def picture(path: Path, width: float = 6.4, height: float = 3.6) -> Iterator[Axes]:
    """Axes to draw on, sizes in inches; written as SVG when the block ends.

    The background is transparent, and text stays text. A file depends on what it shows only.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plain: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "qs-jax", "font.size": 9}
    plain |= {"font.family": "sans-serif", "legend.frameon": False}
    plain |= {"axes.spines.top": False, "axes.spines.right": False}
    with rc_context(plain | dict.fromkeys(ink, INK)):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots()
        with write_whole(path) as (staged,):
            figure.savefig(staged, format="svg", transparent=True, metadata={"Date": None})
            head, body = staged.read_text(encoding="utf-8").split("<defs>", 1)
            staged.write_text(f"{head}{_STYLE}<defs>{body}", encoding="utf-8")
