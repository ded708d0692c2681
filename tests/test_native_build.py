"""The C++ kernels are built once, safely, and what goes wrong says what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bicompile.lowering.native import NativeBuildError, build

ROOT = Path(__file__).resolve().parent.parent

# Builds a small op family instead of ours, so that a build takes a second.
_PROGRAM = """
import sys
from pathlib import Path
from bicompile.lowering.native import build
build._LOWERING = Path(sys.argv[1])
print(*build.load("small"))
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An op family of one small file in a directory of its own, and an empty cache."""
    folder = tmp_path / "lowering" / "small"
    folder.mkdir(parents=True)
    (folder / "cpu.cpp").write_text('extern "C" int bicompile_small() { return 1; }\n')
    monkeypatch.setattr(build, "_LOWERING", tmp_path / "lowering")
    monkeypatch.setenv("BICOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("BICOMPILE_ISA", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return folder


def start(family: Path, **env: str) -> subprocess.Popen[str]:
    """A process of its own that builds and loads ``family``."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(family.parent)],
        env={**os.environ, **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def libraries() -> list[Path]:
    return sorted(build.cache_dir().glob("**/*.so"))


def leftovers() -> list[Path]:
    return [path for path in build.cache_dir().iterdir() if path.is_dir()]


def test_second_load_builds_nothing(family: Path, monkeypatch: pytest.MonkeyPatch):
    (path,) = build.load("small")
    assert libraries() == [path] and not leftovers()
    monkeypatch.setattr(build, "_build", lambda family, path: pytest.fail("built again"))
    assert build.load("small") == [path]


def test_without_a_compiler_the_error_says_what_to_install(family: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NativeBuildError, match=r"apt-get install g\+\+"):
        build.load("small")


def test_wrong_cxx_is_named(family: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeBuildError, match="CXX='no-such-compiler'"):
        build.load("small")


def test_broken_compiler_is_named(family: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NativeBuildError, match="false --version"):
        build.load("small")


def test_wrong_instruction_set_is_named(family: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BICOMPILE_ISA", "avx3")
    with pytest.raises(NativeBuildError, match="BICOMPILE_ISA='avx3': expected one of native, avx2, scalar"):
        build.load("small")


def test_compile_error_is_told_in_the_compilers_words(family: Path):
    (family / "cpu.cpp").write_text("#error the message of this test\n")
    with pytest.raises(NativeBuildError, match="the message of this test"):
        build.load("small")
    assert not libraries() and not leftovers()


def test_cache_directory_that_cannot_be_written_is_named(family: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BICOMPILE_CACHE_DIR", "/dev/null/cache")
    with pytest.raises(NativeBuildError, match="Set BICOMPILE_CACHE_DIR"):
        build.load("small")


def test_damaged_library_is_named(family: Path):
    path = build.library_path("small")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a library")
    with pytest.raises(NativeBuildError, match=f"could not load {path}.*Delete the file"):
        build.load("small")


def test_every_change_of_source_changes_the_name(family: Path):
    names = {build.library_path("small")}
    (family / "cpu.cpp").write_text('extern "C" int bicompile_small() { return 2; }\n')
    names.add(build.library_path("small"))
    (family / "kernel.h").write_text("")
    names.add(build.library_path("small"))
    (family / "kernel.h").rename(family / "other.h")
    names.add(build.library_path("small"))
    assert len(names) == 4


def test_each_instruction_set_has_a_library_of_its_own(family: Path, monkeypatch: pytest.MonkeyPatch):
    names = set()
    for isa in ("native", "avx2", "scalar"):
        monkeypatch.setenv("BICOMPILE_ISA", isa)
        names.add(build.library_path("small"))
    assert len(names) == 3


def test_processes_that_start_at_once_share_one_build(family: Path):
    processes = [start(family) for _ in range(4)]
    told = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert {output.strip() for output, _ in told} == {str(build.library_path("small"))}
    assert sum("compiling the CPU kernels" in errors for _, errors in told) == 1
    assert libraries() == [build.library_path("small")] and not leftovers()


def test_killed_build_leaves_no_library_and_no_lock(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A compiler that stops half way through the library, where a build that writes in place would do harm.
    slow = tmp_path / "slow-g++"
    slow.write_text(
        '#!/bin/sh\ncase "$*" in\n*-shared*)\n'
        '  while [ "$1" != -o ]; do shift; done\n'
        f'  echo half > "$2"; touch "{tmp_path}/linking"; sleep 60;;\n'
        '*) exec g++ "$@";;\nesac\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    process = start(family)
    while not (tmp_path / "linking").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not build.library_path("small").exists()

    slow.write_text('#!/bin/sh\nexec g++ "$@"\n')
    assert build.load("small") == [build.library_path("small")]
