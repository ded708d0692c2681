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


def _copies(tree: ast.AST) -> list[tuple[str, str]]:
    """Every ``a = b`` between two names."""
    return [
        (node.targets[0].id, node.value.id)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Name)
    ]


def turned_copies(function: ast.FunctionDef) -> list[str]:
    """Variables that start as copies of each other and take each other's value in a loop."""
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.While)]
    inside = [copy for loop in loops for copy in _copies(loop)]
    same: dict[str, set[str]] = {}
    for a, b in set(_copies(function)) - set(inside):
        joined = same.get(a, {a}) | same.get(b, {b})
        same |= dict.fromkeys(joined, joined)
    return [f"{a} = {b}" for a, b in inside if b in same.get(a, ())]


def test_no_kernel_turns_copies_in_a_loop():
    """Triton compares values, not names: such variables it takes for ones that the loop leaves alone.

    So in version 3.6 (``CodeGenerator._find_carries``); neither the compiler nor the interpreter shows it.
    """
    ring = "def f(x):\n  a = x\n  b = a\n  while a < 3:\n    new = load(b)\n    a = b\n    b = new\n"
    (function,) = ast.parse(ring).body
    assert isinstance(function, ast.FunctionDef) and turned_copies(function) == ["a = b"]
    found = []
    for path in sorted((ROOT / "lowering").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found += [f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {copy}" for copy in turned_copies(node)]
    assert not found
