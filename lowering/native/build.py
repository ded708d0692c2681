"""Compile C++ kernels into shared libraries, one for an op family or a part of it, once per machine, and load them.

The libraries go to the user's cache directory (``$BICOMPILE_CACHE_DIR``, else ``$XDG_CACHE_HOME/bicompile``, else
``~/.cache/bicompile``) under names that hash sources, flags, compiler, processor and torch, so a changed kernel never
meets an old binary.  Each is written under a temporary name and renamed into place: several processes may start at
once.  ``$BICOMPILE_ISA`` picks the instruction set: ``native`` (default), or for checks ``avx2`` or ``scalar``,
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
    "avx2": ["-march=x86-64-v3", "-O0"],
    "scalar": ["-DBICOMPILE_SCALAR", "-O0"],
}
# Never -ffast-math: the kernels state their order, and the compiler must keep it.
_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
_FLAGS += ["-Wno-maybe-uninitialized"]  # gcc 12 says it of its own AVX-512 intrinsics
# Many templates; started last, one of them would be compiled alone while the other processors wait.
_SLOW = ("reduction_others", "softmax", "norm", "attention_backward")


class NativeBuildError(RuntimeError):
    """The C++ kernels could not be built or loaded; the message says what to install or to report."""


def libraries() -> list[str]:
    """The names of all libraries, those first that take longest to compile."""
    names = {path.parent.name + path.stem.removeprefix("cpu") for path in _LOWERING.glob("*/cpu*.cpp")}
    slow = [name for name in _SLOW if name in names]
    return slow + sorted(names - set(slow))


def source(name: str) -> Path:
    """The one file of a library: ``reduction/cpu.cpp`` of ``reduction``, ``reduction/cpu_x.cpp`` of ``reduction_x``."""
    family, *part = name.split("_")
    return _LOWERING / family / f"{'_'.join(['cpu', *part])}.cpp"


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


def library_path(name: str) -> Path:
    """The file that this machine, this torch and the sources of the library ``name`` call for."""
    key = hashlib.sha256()
    for path in [source(name), *sorted(_LOWERING.glob("*/*.h"))]:
        key.update(path.relative_to(_LOWERING).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for text in (*_FLAGS, *_ISA_FLAGS[isa()], _version(compiler()), _processor(), torch.__version__):
        key.update(text.encode() + b"\0")
    return cache_dir() / f"bicompile_{name}_{isa()}_{key.hexdigest()[:16]}.so"


def load(*names: str) -> list[Path]:
    """Build the libraries ``names`` that the cache lacks, load them and register their kernels.

    Returns:
        The paths of the loaded libraries, in the order of ``names``.

    Raises:
        NativeBuildError: no compiler, a failed compilation, a cache directory that cannot be written, or a library
            that does not load.
    """
    paths = [library_path(name) for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_build_once, names, paths))
    for path in paths:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            message = f"bicompile could not load {path}: {error}. Delete the file and try again."
            raise NativeBuildError(message) from error
    return paths


def _build_once(name: str, path: Path) -> None:
    if not path.exists():
        with _only_one_builder(path):
            if not path.exists():  # another process may have built it while this one waited
                _build(name, path)


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


def _build(name: str, path: Path) -> None:
    print(f"bicompile: compiling the CPU kernels of {name}, once for this machine ...", file=sys.stderr, flush=True)
    package = Path(torch.__file__).parent
    includes = [f"-I{_NATIVE}", f"-I{_LOWERING}", "-isystem", str(package / "include")]
    # No rpath: torch's libraries are in the process already when this one is loaded.
    libraries = [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"]
    # A compiler that links its own libstdc++ statically would else export half of it, and mix it with torch's.
    libraries.append("-Wl,--exclude-libs,ALL")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as directory:
        library = Path(directory) / "library.so"
        flags = [*_FLAGS, *_ISA_FLAGS[isa()], *includes, "-shared"]
        _run([compiler(), *flags, str(source(name)), "-o", str(library), *libraries])
        os.replace(library, path)


@functools.cache
def _version(program: str) -> str:
    return _run([program, "--version"])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NativeBuildError(
            f"bicompile could not compile its CPU kernels (g++ 11 or newer is needed):\n"
            f"{' '.join(command)}\n{done.stderr.strip()}"
        )
    return done.stdout
