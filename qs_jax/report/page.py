"""One self-contained HTML file: template, style, script and data in it, nothing from elsewhere."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qs_jax.report.content import Report, to_json

_SCRIPTS = ("data.js", "svg.js", "maps.js", "text.js", "charts.js", "files.js", "app.js")


def render(report: Report) -> str:
    """The page as text."""
    return render_json(to_json(report))


def render_json(content: dict[str, Any]) -> str:
    """The page of a report that is JSON already (`content.to_json`)."""
    folder = resources.files("qs_jax.report") / "page"

    def read(name: str) -> Markup:
        return Markup((folder / name).read_text(encoding="utf-8"))

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(str(read("report.html.jinja")))
    page = template.render(
        content=content,
        style=read("style.css"),
        script=Markup("\n").join(map(read, _SCRIPTS)),
        data=embedded(content),
    )
    return page.lstrip()


def embedded(content: dict[str, Any]) -> Markup:
    """JSON that is safe inside a script element: no character HTML or a script could act on.

    Raises:
      ValueError: It holds NaN or infinity.
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)  # ASCII only
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def write(report: Report, path: Path) -> Path:
    """Write the page as one file."""
    path.write_text(render(report), encoding="utf-8")
    return path
