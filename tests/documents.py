"""The pages that people read, as their tests see them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pages() -> list[Path]:
    """Every page, written or generated."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def is_generated(page: Path) -> bool:
    """Whether a map wrote the page: it says so in its third line, and its entries lie beside it."""
    return (
        page.read_text().splitlines()[2].startswith("Written by `bicompile map") and page.with_suffix(".json").exists()
    )


def name_of(page: Path) -> str:
    """The page's path from the top, which names it in a test."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """One fenced block, or a comment that runs before the next one."""

    language: str
    info: str
    code: str
    line: int
    not_run: str = ""


_FENCE = re.compile(r"^```(\w*)[ \t]*([^\n]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"^<!-- run first\n(.*?)-->$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: ([^\n]+) -->\n\Z")


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page and its ``<!-- run first`` comments, from top to bottom."""
    found = []
    for match in _FENCE.finditer(text):
        skipped = _NOT_RUN.search(text, 0, match.start())
        reason = skipped[1] if skipped else ""
        found.append(Block(match[1], match[2], match[3], text.count("\n", 0, match.start()) + 2, reason))
    for match in _COMMENT.finditer(text):
        found.append(Block("python", "", match[1], text.count("\n", 0, match.start()) + 2))
    return sorted(found, key=lambda block: block.line)


def without_fences(text: str) -> str:
    """The page with its fenced blocks emptied; lines keep their numbers."""
    return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
