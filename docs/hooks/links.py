"""MkDocs hook: publish the files outside docs/ that its pages link to.

Pages name them by paths that hold in the repository and on a forge (`../benchmarks/README.md`; a
page in a folder below docs/ has one more `../`). The site has no folder above its pages, so a
linked file is added to it under its path in the repository and the link follows. A link to a file
that is not there still fails the strict build.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def _outside(page: File) -> re.Pattern[str]:
    """Links of a page of docs/ that leave docs/."""
    up = r"\.\./" * page.src_uri.count("/")
    return re.compile(rf"(?<=\]\()(?P<up>{up})\.\./(?P<path>[^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every existing file of the repository that a page of docs/ links to."""
    root = Path(config.docs_dir).parent
    for page in list(files.documentation_pages()):
        for link in _outside(page).finditer(page.content_string):
            path = link["path"]
            if (root / path).is_file() and files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links at the places where `on_files` put the files."""
    if page.file.generated_by is None:
        return _outside(page.file).sub(r"\g<up>\g<path>", markdown)
    return markdown.replace("](../docs/", "](../")
