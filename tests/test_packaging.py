"""The package is whole from a wheel, an sdist and a bare checkout, and nothing else goes along."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
# Top-level directory in the repository, and the package it is installed as.
HOMES = {"bicompile": "bicompile", "passes": "bicompile.passes", "lowering": "bicompile.lowering"}
NOT_DATA = {".py", ".pyc", ".pyi"}

needs_checkout = pytest.mark.skipif(not (ROOT / "passes").is_dir(), reason="not a checkout")


def package_directories() -> dict[str, Path]:
    """Every directory under the three homes that holds Python files, by package name."""
    found = {}
    for home, package in HOMES.items():
        for directory in [ROOT / home, *(ROOT / home).rglob("*/")]:
            if any(directory.glob("*.py")):
                inner = directory.relative_to(ROOT / home).parts
                found[".".join((package, *inner))] = directory
    return found


def data_files() -> list[Path]:
    """What lies in the packages and is not Python."""
    files = [path for directory in package_directories().values() for path in directory.iterdir()]
    return [path for path in files if path.is_file() and path.suffix not in NOT_DATA]


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """The output of ``command``; its environment has ``path`` as the only PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(tree: Path, out: Path) -> Path:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--wheel-dir", str(out), str(tree)),
        cwd=out,
    )
    return next(out.glob("bicompile-*.whl"))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone has, to build in: a build leaves ``build/`` behind and would meet an old one."""
    copy = tmp_path_factory.mktemp("tree") / "bicompile"
    junk = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=junk)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    run(sys.executable, "-c", code, cwd=tree)
    return next(out.glob("bicompile-*.tar.gz"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel in it, as pip unpacks it."""
    target = tmp_path_factory.mktemp("site")
    flags = ("--quiet", "--no-deps", "--no-index", "--target", str(target))
    run(sys.executable, "-m", "pip", "install", *flags, str(wheel), cwd=target)
    return target


def contents(wheel: Path) -> set[str]:
    names = set(zipfile.ZipFile(wheel).namelist())
    return {name for name in names if ".dist-info/" not in name}


def expected_contents() -> set[str]:
    """The files a wheel must hold: every package's Python and data, under its installed name."""
    files = set()
    for package, directory in package_directories().items():
        folder = package.replace(".", "/")
        files |= {f"{folder}/{path.name}" for path in directory.glob("*.py")}
    for path in data_files():
        home, *inner = path.relative_to(ROOT).parts
        files.add("/".join([HOMES[home].replace(".", "/"), *inner]))
    return files


def test_every_package_directory_is_listed_and_every_listed_one_exists():
    assert sorted(SETUPTOOLS["packages"]) == sorted(package_directories())


def test_every_package_directory_has_an_init():
    assert [name for name, path in package_directories().items() if not (path / "__init__.py").exists()] == []


def test_every_data_file_matches_a_pattern():
    patterns = SETUPTOOLS["package-data"]["*"]
    lost = [path for path in data_files() if not any(fnmatch.fnmatch(path.name, p) for p in patterns)]
    assert lost == []


def test_wheel_holds_every_file_and_no_other(wheel: Path):
    assert contents(wheel) == expected_contents()


def test_wheel_puts_one_name_at_the_top(wheel: Path):
    assert {name.split("/")[0] for name in contents(wheel)} == {"bicompile"}


def test_wheel_built_from_the_sdist_is_the_same(sdist: Path, wheel: Path, tmp_path: Path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    out = tmp_path / "wheel"
    out.mkdir()
    assert contents(build_wheel(unpacked, out)) == contents(wheel)


def test_sdist_carries_licence_tests_and_constraints(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "constraints.txt", "tests/conftest.py", "tests/test_packaging.py"} <= names


IMPORTS = """
import sys
import bicompile, bicompile.passes, bicompile.lowering, bicompile.lowering.native as native
print(bicompile.__file__, bicompile.passes.__file__, native.__file__, sep="\\n")
assert not {"passes", "lowering", "tests"} & set(sys.modules)
"""


def test_installed_wheel_imports_from_anywhere(installed: Path, tmp_path: Path):
    lines = run(sys.executable, "-c", IMPORTS, cwd=tmp_path, path=installed).splitlines()
    assert all(Path(line).is_relative_to(installed / "bicompile") for line in lines)


@needs_checkout
def test_bare_checkout_imports_its_own_parts(tmp_path: Path):
    lines = run(sys.executable, "-c", IMPORTS, cwd=ROOT).splitlines()
    homes = ("bicompile", "passes", "lowering")
    assert all(Path(line).is_relative_to(ROOT / home) for line, home in zip(lines, homes, strict=True))


@needs_checkout
@pytest.mark.parametrize("name", ["passes", "lowering"])
def test_parts_refuse_to_be_imported_under_their_folder_name(name: str):
    code = f"try:\n    import {name}\nexcept ImportError as e:\n    print(e)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == f"import bicompile.{name}, not {name}"


def test_backend_works_by_name_with_no_import(installed: Path, tmp_path: Path):
    code = "import torch; print('batch_invariant' in torch._dynamo.list_backends())"
    assert run(sys.executable, "-c", code, cwd=tmp_path, path=installed).strip() == "True"


def test_entry_points_name_what_exists(installed: Path, tmp_path: Path):
    names = [PROJECT["project"]["scripts"]["bicompile"]]
    names += PROJECT["project"]["entry-points"]["torch_dynamo_backends"].values()
    code = "import pkgutil, sys; print(*(callable(pkgutil.resolve_name(name)) for name in sys.argv[1:]))"
    assert run(sys.executable, "-c", code, *names, cwd=tmp_path, path=installed).split() == ["True"] * len(names)


def test_pytest_finds_the_plugin_and_does_not_import_torch_for_it(installed: Path, tmp_path: Path):
    (tmp_path / "test_plain.py").write_text(
        "import sys\n\n\ndef test_plain():\n    assert not {'torch', 'hypothesis'} & set(sys.modules)\n"
    )
    plugins = ["-p", "no:hypothesispytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
    out = run(sys.executable, "-m", "pytest", "--trace-config", *plugins, str(tmp_path), cwd=tmp_path, path=installed)
    assert "1 passed" in out and str(installed / "bicompile" / "pytest_plugin.py") in out
    out = run(sys.executable, "-m", "pytest", "--fixtures", *plugins, str(tmp_path), cwd=tmp_path, path=installed)
    assert "batch_invariance" in out


def test_constraints_meet_the_declared_torch_range():
    requirements = pytest.importorskip("packaging.requirements")
    (torch,) = [r for r in PROJECT["project"]["dependencies"] if r.startswith("torch")]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert len(pins) == 1
    assert requirements.Requirement(torch).specifier.contains(pins[0].removeprefix("torch=="))
