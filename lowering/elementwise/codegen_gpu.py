"""Make Inductor's Triton kernels compute elementwise functions the same in every graph.

One thread computes one element by one sequence of instructions, so with contraction off (``bicompile.config``) neither
fusion nor tiles nor warps can show.  Three things are left, and are pinned here:

* ``x / 3`` becomes ``x * (1 / 3)`` where the divisor is a number that Inductor knows, and stays a division where it is
  a symbolic size::

      tmp1 = tmp0 * 0.3333333333333333                  # static shapes before
      tmp1 = triton.language.div_rn(tmp0, 3.0)          # after, as with dynamic shapes

* A quotient or a square root of symbolic sizes, which is a number of Python's where shapes are static, is computed in
  float32 by the kernel: in float64 after, as Python does.  A power may differ from Python's in the last bit of float64,
  which no ``n**-0.5`` or ``n**0.5`` of a size below 2**22 shows in float32 (all were looked at), where all but float64
  graphs hold it.  Other functions of symbolic sizes are refused.

* The library of device functions, which some releases replace by the one of the CUDA toolkit if there is one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch._inductor import lowering
from torch._inductor.codegen.triton import TritonPrinter
from torch.utils._sympy import functions

LIBDEVICE = "TRITON_LIBDEVICE_PATH"
"""The environment variable by which Inductor and its compile workers find the library of device functions."""

_lock = threading.RLock()


@contextlib.contextmanager
def pinned_gpu_codegen() -> Iterator[None]:
    """Pin what Inductor writes for GPUs until the context is left.  May be nested.

    The patches hold for the process: enter it around code generation only, under Dynamo's compile lock.
    """
    pin_libdevice()
    with _lock, contextlib.ExitStack() as stack:
        stack.enter_context(unittest.mock.patch.object(lowering, "get_constant_value", _no_constant))
        for name, method in _size_functions().items():
            stack.enter_context(unittest.mock.patch.object(TritonPrinter, name, method, create=True))
        yield


def _no_constant(x: object) -> None:
    """Inductor's question whether a divisor is a known number: never, so that it is divided by."""
    return None


def _size_functions() -> dict[str, Callable[[Any, Any], str]]:
    """How Triton code computes with symbolic sizes: the printer's methods that are replaced."""
    refused = {f"_print_{name}": _refused for name in dir(functions) if name.startswith("OpaqueUnaryFn_")}
    exact = {
        "_print_Float": _number,
        "_print_IntTrueDiv": _quotient,
        "_print_FloatTrueDiv": _quotient,
        "_helper_sqrt": _square_root,
    }
    return {**refused, **exact, "_print_OpaqueUnaryFn_sqrt": lambda self, expr: _square_root(self, expr.args[0])}


def _number(self: Any, expr: Any) -> str:
    return f"tl.full([], {float(expr)!r}, tl.float64)"


def _quotient(self: Any, expr: Any) -> str:
    above, below = (_wide(self, argument) for argument in expr.args)
    return f"({above} / {below})"


def _square_root(self: Any, expr: Any) -> str:
    return f"libdevice.sqrt({_wide(self, expr)})"


def _wide(printer: Any, expr: Any) -> str:
    """The expression as a float64 scalar."""
    if expr.is_number:
        return _number(printer, expr)
    return f"({printer._print(expr)}).to(tl.float64)"


def _refused(self: Any, expr: Any) -> str:
    from bicompile.errors import UnsupportedOpError

    raise UnsupportedOpError(
        f"{expr}: expected arithmetic of symbolic sizes, got a function that Python and the GPU round differently, "
        "so that static and dynamic shapes would differ. Compile with dynamic=False, or compute it outside."
    )


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
