"""Make Inductor's Triton kernels compute elementwise functions the same in every graph.

One thread computes one element by one sequence of instructions, so with contraction off (``bicompile.config``) neither
fusion nor tiles nor warps can show.  Two things are left, and are pinned here:

* ``x / 3`` becomes ``x * (1 / 3)`` where the divisor is a number that Inductor knows, and stays a division where it is
  a symbolic size::

      tmp1 = tmp0 * 0.3333333333333333                  # static shapes before
      tmp1 = triton.language.div_rn(tmp0, 3.0)          # after, as with dynamic shapes

* the library of device functions, which some releases replace by the one of the CUDA toolkit if there is one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

from torch._inductor import lowering

LIBDEVICE = "TRITON_LIBDEVICE_PATH"
"""The environment variable by which Inductor and its compile workers find the library of device functions."""

_lock = threading.RLock()


@contextlib.contextmanager
def pinned_gpu_codegen() -> Iterator[None]:
    """Pin what Inductor writes for GPUs until the context is left.  May be nested.

    The patches hold for the process: enter it around code generation only, under Dynamo's compile lock.
    """
    pin_libdevice()
    with _lock, unittest.mock.patch.object(lowering, "get_constant_value", _no_constant):
        yield


def _no_constant(x: object) -> None:
    """Inductor's question whether a divisor is a known number: never, so that it is divided by."""
    return None


def pin_libdevice() -> None:
    """Let Triton, here and in compile workers, use the device library that it came with, or the one that the user set.

    Does nothing where Triton is not installed.
    """
    if (path := _libdevice()) is None:
        return
    from triton import knobs

    os.environ.setdefault(LIBDEVICE, path)
    knobs.nvidia.libdevice_path = os.environ[LIBDEVICE]


def signature() -> str:
    """What a cached artefact depends on here: the device library's contents, and Triton's version."""
    if (path := _libdevice()) is None:
        return "no triton"
    import triton

    chosen = Path(os.environ.get(LIBDEVICE, path))
    contents = chosen.read_bytes() if chosen.is_file() else b""
    return f"triton {triton.__version__} {hashlib.sha256(contents).hexdigest()}"


@functools.cache
def _libdevice() -> str | None:
    """The device library that Triton came with; None without Triton."""
    try:
        from triton.backends import nvidia
    except ImportError:
        return None
    return str(Path(nvidia.__file__).parent / "lib" / "libdevice.10.bc")
