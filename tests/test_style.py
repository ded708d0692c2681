"""The repository is clean under ruff and mypy, so a finding is always new."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def check(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing():
    pytest.importorskip("ruff")
    check("ruff", "check", "--no-cache", ".", cwd=ROOT)


def test_every_file_is_formatted():
    pytest.importorskip("ruff")
    check("ruff", "format", "--check", "--no-cache", ".", cwd=ROOT)


def test_mypy_finds_nothing(tmp_path: Path):
    pytest.importorskip("mypy")
    # mypy does not see the __path__ that joins passes/ and lowering/ to the package: assemble a copy.
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "bicompile", tmp_path / "bicompile", ignore=skip)
    for part in ("passes", "lowering"):
        shutil.copytree(ROOT / part, tmp_path / "bicompile" / part, ignore=skip)
    # The cache lies in the checkout: most of the time goes into torch itself, which seldom changes.
    cache = ("--cache-dir", str(ROOT / ".mypy_cache"))
    check("mypy", "--config-file", str(ROOT / "pyproject.toml"), *cache, "-p", "bicompile", cwd=tmp_path)


def test_only_kernels_go_without_types():
    """mypy lets the kernels' modules leave types out; what surrounds the kernels there must not."""
    untyped = []
    for path in sorted((ROOT / "lowering").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or any(
                "triton." in ast.unparse(d) or "gluon." in ast.unparse(d) for d in node.decorator_list
            ):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if missing or node.returns is None:
                untyped.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not untyped
