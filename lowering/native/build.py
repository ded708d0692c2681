"""Compile the C++ kernels of every op family into one shared library, once per machine, and load it.

The library goes to the user's cache directory (``$BICOMPILE_CACHE_DIR``, else ``$XDG_CACHE_HOME/bicompile``, else
``~/.cache/bicompile``) under a name that hashes sources, flags, compiler, processor and torch, so a changed kernel
never meets an old binary.  It is written under a temporary name and renamed into place: several processes may start
at once.  ``$BICOMPILE_ISA`` picks the instruction set: ``native`` (default), or for checks ``avx2`` or ``scalar``,
which are quick to compile and slow; it changes no bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_NATIVE = Path(__file__).resolve().parent
_LOWERING = _NATIVE.parent

_ISA_FLAGS = {
    "native": ["-march=native"],
    # The builds that check the first: nobody waits for their speed, only for their compilation.
    "avx2": ["-march=x86-64-v3", "-O1"],
    "scalar": ["-DBICOMPILE_SCALAR", "-O1"],
}
# Never -ffast-math: the kernels state their order, and the compiler must keep it.
_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
_FLAGS += ["-Wno-maybe-uninitialized"]  # gcc 12 says it of its own AVX-512 intrinsics
# Many templates; started last, one of them would be compiled alone while the other processors wait.
_SLOW = ("norm", "reduction", "softmax")


class NativeBuildError(RuntimeError):
    """The C++ kernels could not be built or loaded; the message says what to install or to report."""


def sources() -> list[Path]:
    """The translation units: one ``cpu.cpp`` for each op family, those first that take longest to compile."""
    return sorted(_LOWERING.glob("*/cpu.cpp"), key=lambda path: (path.parent.name not in _SLOW, path))


def cache_dir() -> Path:
    """Where compiled libraries are kept between processes."""
    if explicit := os.environ.get("BICOMPILE_CACHE_DIR"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bicompile"


def isa() -> str:
    """The instruction set to compile for, from ``$BICOMPILE_ISA``."""
    name = os.environ.get("BICOMPILE_ISA", "native")
    if name not in _ISA_FLAGS:
        raise NativeBuildError(f"BICOMPILE_ISA={name!r}: expected one of {', '.join(_ISA_FLAGS)}")
    return name


def compiler() -> str:
    """The C++ compiler: ``$CXX``, else g++, else clang++."""
    if asked := os.environ.get("CXX"):
        if found := shutil.which(asked):
            return found
        raise NativeBuildError(
            f"CXX={asked!r} is not a program that can be run. Set CXX to a C++ compiler or unset it."
        )
    for name in ("g++", "clang++"):
        if found := shutil.which(name):
            return found
    raise NativeBuildError(
        "bicompile compiles its CPU kernels on first use and found no C++ compiler. Install g++ 11 or newer "
        "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX to one."
    )


def _processor() -> str:
    """What the binary may assume of this machine: architecture and instruction set extensions."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    return platform.machine() + platform.processor()


def library_path() -> Path:
    """The file that this machine, this torch and these sources call for."""
    version = _run([compiler(), "--version"])
    key = hashlib.sha256()
    for path in sorted([*sources(), *_LOWERING.glob("*/*.h")]):
        key.update(path.relative_to(_LOWERING).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for text in (*_FLAGS, *_ISA_FLAGS[isa()], version, _processor(), torch.__version__):
        key.update(text.encode() + b"\0")
    return cache_dir() / f"bicompile_cpu_{isa()}_{key.hexdigest()[:16]}.so"


@functools.cache
def load() -> Path:
    """Build the library if the cache lacks it, load it and register its kernels with torch.

    Returns:
        The path of the loaded library.

    Raises:
        NativeBuildError: no compiler, a failed compilation, a cache directory that cannot be written, or a library
            that does not load.
    """
    path = library_path()
    if not path.exists():
        with _only_one_builder(path):
            if not path.exists():  # another process may have built it while this one waited
                _build(path)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise NativeBuildError(f"bicompile could not load {path}: {error}. Delete the file and try again.") from error
    return path


@contextlib.contextmanager
def _only_one_builder(path: Path) -> Iterator[None]:
    """Let one process build; the others wait.  The lock goes when its holder does, crashed or not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")
    except OSError as error:
        raise NativeBuildError(
            f"bicompile cannot write its cache directory: {error}. Set BICOMPILE_CACHE_DIR to one that it can write."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(path: Path) -> None:
    print("bicompile: compiling the CPU kernels, once for this machine ...", file=sys.stderr, flush=True)
    package = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as directory:
        compile_one = functools.partial(_compile, package=package, directory=Path(directory))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources()))
        library = Path(directory) / "library.so"
        # No rpath: torch's libraries are in the process already when this one is loaded.
        libraries = [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"]
        # A compiler that links its own libstdc++ statically would else export half of it, and mix it with torch's.
        libraries.append("-Wl,--exclude-libs,ALL")
        _run([compiler(), "-shared", *map(str, objects), "-o", str(library), *libraries])
        os.replace(library, path)


def _compile(source: Path, *, package: Path, directory: Path) -> Path:
    target = directory / f"{source.parent.name}.o"
    include = package / "include"
    includes = [f"-I{_NATIVE}", f"-I{_LOWERING}", "-isystem", str(include)]
    _run([compiler(), *_FLAGS, *_ISA_FLAGS[isa()], *includes, "-c", str(source), "-o", str(target)])
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NativeBuildError(
            f"bicompile could not compile its CPU kernels (g++ 11 or newer is needed):\n"
            f"{' '.join(command)}\n{done.stderr.strip()}"
        )
    return done.stdout
