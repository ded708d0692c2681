"""Every measured number on the pages that people read comes from a result file of the benchmarks.

A figure is a link to its file, whose title says what it is of: ``[1.08](.../model.json "prefill 1x2048 / Inductor")``
for a summary's value, ``[637 s](.../completions.json "ours_s of SmolLM2 ...")`` for a field of a row (``... against
Inductor`` where several rows have that case), ``[2.13.0](.../model.json "meta.versions.torch")`` for what was measured.
Any other number that looks measured is an error.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT, is_generated, name_of, pages, without_fences

RESULTS = ROOT / "examples" / "benchmarks" / "results"

_FIGURE = re.compile(r'\[([^\]]*)\]\(([^)\s]*benchmarks/results/[^)\s]+\.json)(?:\s+"([^"]*)")?\)')
_SHOWN = re.compile(r"(\d+(?:\.\d+)?)(?: ?(?:x|s|us|GiB|tokens/s|TFLOP/s))?")

_WORDS = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|sixty|a hundred|a thousand|a few"
_UNITS = (
    r"x|×|%|percent|per cent|[nuµm]?s|secs?|seconds?|mins?|minutes?|h|hours?|[kKMGT]i?B|gigabytes?|megabytes?"
    r"|tokens?/s|T?FLOPS?|T?FLOP/s|times|fold|nats?"
)
_MEASURED = (
    re.compile(rf"(?<![\w.])\d+(?:[.,]\d+)* ?(?:{_UNITS})(?![\w-])"),
    re.compile(rf"\b(?:{_WORDS})[ -](?:percent|per cent|times|fold|seconds?|minutes?|hours?)\b", re.IGNORECASE),
    re.compile(r"\b(?:twice|thrice|half) (?:as|the (?:speed|time|memory))\b", re.IGNORECASE),
    re.compile(r"(?<![\w.])\d+ (?:of|out of) \d+\b"),
    # A decimal number that is no version: neither of three parts nor behind the name of what has versions.
    re.compile(r"(?<![\w.+-])(?<!Python )(?<!torch )(?<!Triton )(?<!PyTorch )\d+\.\d+(?![\w.]*\.\d)(?!\w)"),
)


def wrong_figures(text: str, page: Path) -> list[str]:
    """What is wrong with the numbers of a page: figures that are not in their files, and numbers without a file."""
    prose = re.sub(r"<!--.*?-->", lambda m: "\n" * m[0].count("\n"), without_fences(text), flags=re.DOTALL)
    wrong = []
    for match in _FIGURE.finditer(prose):
        if complaint := _disagreement(match[1], page.parent / match[2], match[3]):
            wrong.append(f"{match[0]}: {complaint}")
    prose = _FIGURE.sub("figure", prose)
    prose = re.sub(r"(\]\()[^)]*\)", r"\1)", prose)  # addresses
    prose = re.sub(r"`([^`\n]*)`", lambda m: m[1] if _SHOWN.fullmatch(m[1]) and not m[1].isdigit() else "code", prose)
    for pattern in _MEASURED:
        wrong += [f"{match[0]}: measured, and no result file is named" for match in pattern.finditer(prose)]
    return wrong


def _disagreement(shown: str, file: Path, title: str | None) -> str | None:
    """Why a figure is not what its file says; None if it is, or if the link is one to the whole file."""
    if not file.is_file() or not file.resolve().is_relative_to(RESULTS):
        return "there is no such result file"
    if not title:
        return "a figure without a title that names it" if re.search(r"\d", shown) else None
    try:
        value = look_up(json.loads(file.read_text()), title)
    except LookupError as error:
        return str(error.args[0])
    if title.startswith("meta."):
        return None if str(value).startswith(shown) else f"the file says {value}"
    number = _SHOWN.fullmatch(shown)
    if not number:
        return "expected a number, or a number and its unit"
    decimals = len(number[1].partition(".")[2])
    agrees = abs(float(number[1]) - float(value)) <= 0.5 * 10**-decimals + 1e-9
    if agrees and (float(number[1]) == float(value) or len(number[1].replace(".", "").lstrip("0")) > 1):
        return None
    return f"the file says {value}"


def look_up(result: dict[str, Any], title: str) -> Any:
    """The value that a title names in a result file.

    Raises:
        LookupError: it names none, or several.
    """
    if title in result["summary"]:
        return result["summary"][title]["value"]
    if title.startswith("meta."):
        value: Any = result["meta"]
        for key in title.split(".")[1:]:
            if key not in value:
                raise LookupError(f"the file has no {title}")
            value = value[key]
        return value
    field, _, case = title.partition(" of ")
    rows = [r for r in result["rows"] if case in (r["case"], f"{r['case']} against {r['against']}") and field in r]
    if len(rows) != 1:
        raise LookupError(f"the file has no figure of that name, and {len(rows)} rows")
    return rows[0][field]


@pytest.mark.parametrize("page", [page for page in pages() if not is_generated(page)], ids=name_of)
def test_figures_are_those_of_their_result_files(page: Path):
    assert not wrong_figures(page.read_text(), page)


def test_pages_have_figures():
    found = {page.name: len(_FIGURE.findall(page.read_text())) for page in pages()}
    assert found["README.md"] and found["speed.md"]


_FILE = "examples/benchmarks/results/nvidia-h100-80gb-hbm3/model.json"
_SUMMARY = json.loads((ROOT / _FILE).read_text())
_KEY, _VALUE = next((key, entry["value"]) for key, entry in _SUMMARY["summary"].items() if entry["value"] != 1)
_GOOD = f'[{_VALUE:.2f}]({_FILE} "{_KEY}")'


def _cases() -> Iterator[tuple[str, bool]]:
    """Texts, and whether something is wrong with them."""
    row = next(row for row in _SUMMARY["rows"] if "ours_s" in row)
    yield f"It runs at {_GOOD} of the speed.", False
    yield f'[{row["ours_s"]:.0f} s]({_FILE} "ours_s of {row["case"]} against {row["against"]}")', False
    yield f'[{_SUMMARY["meta"]["threads"]}]({_FILE} "meta.threads") threads, [the file]({_FILE})', False
    yield f'[{_VALUE + 0.02:.2f}]({_FILE} "{_KEY}")', True
    yield f'[{_VALUE:.0f}]({_FILE} "{_KEY}")', True  # one digit could say anything
    yield f'[fast]({_FILE} "{_KEY}")', True
    yield f"[{_VALUE:.2f}]({_FILE})", True
    yield f'[{_VALUE:.2f}]({_FILE} "no such key")', True
    yield f'[{_VALUE:.2f}]({_FILE.replace("model", "none")} "{_KEY}")', True
    yield f'[99]({_FILE} "meta.versions.torch")', True
    for text in ("0.93x", "at 1.21 of it", "132 s", "two minutes", "1.5 GB", "40 %", "338 of 339", "3 times slower"):
        yield f"It takes {text} to run.", True
        yield f"| a | {text} |", True
    yield "It takes `0.93` of the time.", True
    yield "twice as fast", True
    yield "Python 3.10, torch 2.13, version 0.1.0, 128 keys, sm_80, `x[0.5]`, 16x64 tiles, P1, 64 rows", False
    yield "```python\nx = 0.93  # 2 s\n```\n<!-- 0.93x -->", False


@pytest.mark.parametrize(("text", "is_wrong"), list(_cases()))
def test_bad_figures_are_found(text: str, is_wrong: bool):
    assert bool(wrong_figures(text, ROOT / "README.md")) == is_wrong


def test_pictures_are_drawn_from_the_result_files():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "tools" / "draw.py")
    assert spec is not None and spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    changed = [name_of(path) for path, text in draw.drawings().items() if path.read_text() != text]
    assert not changed, "run python docs/tools/draw.py"
