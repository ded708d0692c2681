"""What the site adds to the pages in ``docs/``: a hook of mkdocs.

README, CONTRIBUTING and CHANGELOG lie at the top of the repository, where people look for them, and become pages of the
site.  A page may link to any file of the repository, by its path from the page; the site publishes a copy.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Pages that lie outside of docs/, and what they are called on the site.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_BY_PAGE = {page: source for source, page in OUTSIDE.items()}
_TARGET = re.compile(r"(?<=\]\()[^)\s#]+")
# A browser shows these as they are; everything else is published as text.
_SHOWN = {".png", ".svg"}


def on_files(files: Files, *, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages that lie outside of ``docs/``."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Let the links of a page lead to where the site has the files."""
    uri = page.file.src_uri
    lies_in = ROOT if uri in _BY_PAGE else (DOCS / uri).parent

    def on_the_site(match: re.Match[str]) -> str:
        target = (lies_in / match[0]).resolve()
        if not target.is_file():
            return match[0]  # an address, or broken: mkdocs says so
        path = target.relative_to(ROOT)
        if str(path) in OUTSIDE:
            wanted = OUTSIDE[str(path)]
        elif target.is_relative_to(DOCS):
            wanted = target.relative_to(DOCS).as_posix()
        else:
            wanted = f"repository/{path.as_posix()}" + ("" if path.suffix in _SHOWN else ".txt")
            if wanted not in files.src_uris:
                files.append(File.generated(config, wanted, content=target.read_bytes()))
        return os.path.relpath(wanted, Path(uri).parent)

    return _TARGET.sub(on_the_site, markdown)
