"""The pages that people read: their code prints what they say, their links lead somewhere, nothing is left out."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from documents import ROOT, Block, blocks, name_of, pages, without_fences

# What the reference must show of each public module: all it exports, where it says what that is.
PUBLIC = {
    "bicompile": None,
    "bicompile.testing": None,
    "bicompile.transformers": None,
    "bicompile.sampling": ("SeededSampler",),
    "bicompile.distributed": None,
}

# -- Code -------------------------------------------------------------------------------------------------------------


def run_page(text: str, page: str) -> int:
    """Run a page's Python blocks in one namespace, from top to bottom; how many there were.

    A block of ``text`` entitled "Output" must be what the block before it printed.
    """
    module, printed, count = ModuleType("example"), "", 0
    module.__dict__["__name__"] = "example"
    for block in blocks(text):
        if block.language == "python" and not block.not_run:
            printed = _run(block, module, page)
            count += 1
        elif block.language == "text" and 'title="Output"' in block.info:
            assert printed.rstrip() == block.code.rstrip(), f"{page}:{block.line}: printed was\n{printed}"
    return count


def _run(block: Block, module: ModuleType, page: str) -> str:
    out = io.StringIO()
    code = compile(block.code, "example.py", "exec", flags=0, dont_inherit=True)
    with contextlib.redirect_stdout(out):
        try:
            exec(code, module.__dict__)
        except Exception as error:
            raise AssertionError(f"{page}:{block.line}: this block fails: {error!r}") from error
    return out.getvalue()


WITH_CODE = [
    page for page in pages() if any(b.language == "python" and not b.not_run for b in blocks(page.read_text()))
]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_runs_and_prints_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if "transformers" in page.read_text():
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "example", ModuleType("example"))
    torch.manual_seed(0)
    assert run_page(page.read_text(), name_of(page))


def test_code_that_fails_or_prints_something_else_is_found():
    assert run_page('```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text title="Output"\n1\n```\n', "p") == 2
    with pytest.raises(AssertionError, match="p:2: this block fails: NameError"):
        run_page("```python\ny\n```\n", "p")
    with pytest.raises(AssertionError, match=r"printed was\n +1"):
        run_page('```python\nprint(1)\n```\n\n```text title="Output"\n2\n```\n', "p")
    assert run_page("<!-- not run: no GPU -->\n```python\ny\n```\n<!-- run first\nx = 1\n-->\n", "p") == 1


# -- Links ------------------------------------------------------------------------------------------------------------

_LINK = re.compile(r'\[[^\]]*\]\(\s*([^)\s]+)(?:\s+"[^"]*")?\)')
_HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)


def broken_links(text: str, page: Path) -> list[str]:
    """The relative links of a page that lead to no file of the repository, or to no heading of it."""
    broken = []
    prose = re.sub(r"`[^`\n]*`", "code", without_fences(text))
    for target in _LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.is_file() and file.is_relative_to(ROOT)  # a folder has no place on the site
        if not inside or (anchor and anchor not in anchors(text if file == page else file.read_text())):
            broken.append(target)
    return broken


def anchors(text: str) -> set[str]:
    """What a page's headings are called in links."""
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(without_fences(text))]
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links_lead_to_files_and_headings(page: Path):
    assert not broken_links(page.read_text(), page)


def test_broken_links_are_found():
    page, text = ROOT / "README.md", "## A heading\n[a](LICENSE) [b](#a-heading) [c](#none) [d](no.md) [e](docs/) "
    assert broken_links(text, page) == ["#none", "no.md", "docs/"]
    assert broken_links("![picture](no.svg)\n```\n[a](in-code.md)\n```\n", page) == ["no.svg"]


# -- Nothing is left out ----------------------------------------------------------------------------------------------


def test_every_page_is_on_the_site():
    yaml = pytest.importorskip("yaml")
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def leaves(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from leaves(child)

    from_elsewhere = {"index.md", "contributing.md", "changelog.md"}
    assert sorted(leaves(nav)) == sorted(from_elsewhere | {p.name for p in (ROOT / "docs").glob("*.md")})


def public_names() -> Iterator[tuple[str, str]]:
    """Each public module with each of its names, modules left out."""
    for module, names in PUBLIC.items():
        for name in names or importlib.import_module(module).__all__:
            if name != "__version__" and not inspect.ismodule(getattr(importlib.import_module(module), name)):
                yield module, name


def test_reference_shows_everything_public():
    shown = []
    for path in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        module, _, name = path.replace("passes.", "bicompile.passes.").rpartition(".")  # how the site's tool finds them
        shown.append(getattr(importlib.import_module(module), name))
    wanted = {f"{module}.{name}": getattr(importlib.import_module(module), name) for module, name in public_names()}
    assert not [name for name, thing in wanted.items() if not any(thing is other for other in shown)]


def undocumented(obj: Any, name: str) -> Iterator[str]:
    """What of a public object has no docstring, or no type hint."""
    if isinstance(obj, tuple):  # a constant, which the reference describes
        return
    own = inspect.isclass(obj) or inspect.isfunction(obj)
    if own and not inspect.getdoc(obj) or (obj.__doc__ or "").startswith(f"{name.rpartition('.')[2]}("):
        yield f"{name}: no docstring"  # a dataclass without one gets its signature
    if inspect.isfunction(obj):
        for parameter in inspect.signature(obj).parameters.values():
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls", "draw"):
                yield f"{name}({parameter.name}): no type"
        if inspect.signature(obj).return_annotation is inspect.Signature.empty:
            yield f"{name}: no return type"
    elif inspect.isclass(obj):
        for key, member in vars(obj).items():
            member = member.fget if isinstance(member, property) else getattr(member, "__wrapped__", member)
            if not key.startswith("_") and inspect.isfunction(member):
                yield from undocumented(member, f"{name}.{key}")


@pytest.mark.parametrize(("module", "name"), list(public_names()))
def test_public_names_have_docstrings_and_types(module: str, name: str):
    assert not list(undocumented(getattr(importlib.import_module(module), name), name))


def test_missing_docstrings_and_types_are_found():
    class Bare:
        """Described."""

        def method(self, x):
            return x

    assert list(undocumented(Bare, "Bare")) == [
        "Bare.method: no docstring",
        "Bare.method(x): no type",
        "Bare.method: no return type",
    ]


def test_what_promises_call_refused_is_refused_in_the_op_map():
    entries = json.loads((ROOT / "docs" / "ops.json").read_text())
    text = (ROOT / "docs" / "promises.md").read_text().partition("## What is refused")[2]
    (line,) = (item for item in text.split("\n* ") if "`ctc_loss`" in item)
    named = set(re.findall(r"`(\w+)`", line))
    seen = {name for name in named for entry, found in entries.items() if name in entry and "refused" in found.values()}
    assert len(named) > 5 and named == seen


# -- The site ---------------------------------------------------------------------------------------------------------


def test_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "how-it-works/" in home and (tmp_path / "site" / "api" / "index.html").exists()
