"""Make Inductor's C++ kernels compute elementwise functions by our definitions.

Inductor writes each kernel twice, as vector code on ``at::vec`` (Sleef and polynomials) and as scalar code (libm), and
size, size hints and fusion decide which of the two an element meets.  Inside ``pinned_cpu_codegen()`` both call
``inductor_cpu.h``, whose functions have the same bits in either::

    tmp1 = tmp0.exp()         # vector code before        std::exp(tmp0)            # scalar code before
    tmp1 = bicompile::inductor::exp(tmp0)                 # after, in both

* Functions of ``math.h`` are written from IEEE operations and run at vector speed.
* Other functions run Inductor's own scalar code on each lane.
* Operations that IEEE 754 defines to the bit stay as they are; which ones those are was tested with special values
  (tests/test_elementwise.py).
* Anything else is refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.codegen import cpp
from torch._inductor.codegen.common import pointwise_overrides_data

from bicompile.lowering.native import cache_dir

_HERE = Path(__file__).resolve().parent
_HEADERS = ("elementwise/inductor_cpu.h", "elementwise/math.h", "native/simd.h")
_PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>"

# Ours, of IEEE operations (see math.h).
_OURS = frozenset("exp exp2 expm1 log log2 log10 log1p sigmoid tanh erf sin cos rsqrt sqrt pow".split())
# Ours for floating point, Inductor's for integers: NaN, signed zero or rounding differ between vector and scalar code.
# Sums and products do where two NaNs meet, because the compiler may swap the operands.
_OURS_IF_REAL = {
    "add": "add",
    "mul": "mul",
    "mul_rn": "mul",
    "fma": "fused",
    "maximum": "maximum",
    "minimum": "minimum",
    "relu": "relu",
    "fmod": "fmod",
    "mod": "fmod",
    "remainder": "remainder",
}
# Inductor's scalar code on every lane.
_EACH = frozenset(
    """
    acos acosh asin asinh atan atan2 atanh cosh digamma erfc erfinv hypot lgamma nextafter sinh tan
    """.split()
) | (frozenset(pointwise_overrides_data) - {"fma", "mul_rn"})
# Defined to the bit by IEEE 754 or on integers, and found to agree.
_EXACT = frozenset(
    """
    abs and_ bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil ceil_to_int
    constant copysign div_rn eq floor floor_to_int floordiv frexp ge gt identity index_expr int_truediv isinf isnan
    ldexp le logical_and logical_not logical_or logical_xor lshift lt masked ne neg or_ reciprocal round
    rshift sign signbit square sub to_dtype to_dtype_bitcast truediv trunc trunc_to_int truncdiv
    value_expr where xor
    """.split()
)
# Answered by the kernel before the overrides are asked, or no operation at all.
_STRUCTURE = frozenset(
    """
    bucketize check_bounds device_assert_async dot halide_clamp indirect_indexing inline_asm_elementwise load output
    paren partial_accumulate placeholder reduction scan sort store store_reduction
    """.split()
)
# The classes of torch._inductor.codegen.cpp that change while pinned.
PATCHED = ("CppOverrides", "CppVecOverrides", "CppTile2DOverrides", "CppKernel", "CppVecKernel", "KernelGroup")
_HALVES = (torch.bfloat16, torch.float16)
_BYTES = (torch.int8, torch.uint8)


CONTRACT_FLAG = "off -fwrapv"
"""For Inductor's ``cpp.enable_floating_point_contract_flag``, which the compiler gets as it is: no contraction, and a
second flag with it.  Without that, g++ takes it that no integer of scalar code overflows, while vector code wraps
around, as eager does."""


class CodegenError(RuntimeError):
    """This torch's C++ code generator is not the one that bicompile knows how to pin."""


def materialise_headers() -> Path:
    """Put the headers where generated kernels include them, if they are not there, and return the one to include.

    The directory's name hashes the contents, so that a kernel's source changes with the headers, and the binary that
    Inductor cached with it.  Several processes may do this at once.
    """
    directory = cache_dir().resolve() / f"include-{_headers_hash()}"
    if not all((directory / name).exists() for name in _HEADERS):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix="include-new-") as new:
            for name in _HEADERS:
                target = Path(new) / name
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(_HERE.parent / name, target)
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(target, directory / name)
    return directory / _HEADERS[0]


def signature() -> str:
    """What a cached artefact depends on here: headers, their place, and this file."""
    key = hashlib.sha256(_headers_hash().encode())
    key.update(os.fsencode(cache_dir().resolve()))
    key.update(Path(__file__).read_bytes())
    return key.hexdigest()


@functools.cache
def _headers_hash() -> str:
    key = hashlib.sha256()
    for name in _HEADERS:
        key.update(name.encode() + b"\0" + (_HERE.parent / name).read_bytes() + b"\0")
    return key.hexdigest()[:16]


_lock = threading.RLock()
_depth = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def pinned_cpu_codegen() -> Iterator[None]:
    """Pin what Inductor's C++ code generator writes until the context is left.  May be nested.

    The patches hold for the process: enter it around code generation only, under Dynamo's compile lock.

    Raises:
        CodegenError: this torch lacks something that must be patched.
        UnsupportedOpError: raised by code generation inside, for a function that is neither exact nor pinned.
    """
    global _depth, _undo
    with _lock:
        if _depth == 0:
            with contextlib.ExitStack() as stack:  # undone here if patching itself fails
                _patch(stack)
                _undo = stack.pop_all()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _undo.close()


def _patch(stack: contextlib.ExitStack) -> None:
    classes: list[Any] = [_require(cpp, name) for name in PATCHED]
    scalar, vector, tiles, scalar_kernel, vector_kernel, group = classes
    known = {name for c in (scalar, vector, tiles) for name in dir(c) if not name.startswith("_")}
    for name in (*_OURS, *(set(_OURS_IF_REAL) - {"fma", "mul_rn"})):
        _require(scalar, name)
    functions: tuple[Callable[..., Any], Callable[..., Any]]
    for name in known:
        if name in _OURS:
            functions = (_ours(name),) * 2
        elif name in _OURS_IF_REAL:
            functions = (_ours_if_real(name, scalar), _ours_if_real(name, vector))
        elif name in _EACH:
            functions = (_each(name, scalar),) * 2
        elif name == "round_to_int":
            functions = (_round_to_int,) * 2
        elif name == "floordiv":
            functions = (_integers_only(name, scalar), _integers_only(name, vector))
        elif name in _EXACT | _STRUCTURE:
            continue
        else:
            functions = (_refused(name),) * 2
        for owner, function in zip((scalar, vector), functions, strict=True):
            function.__name__ = name  # by which CppVecOverrides falls back to CppOverrides
            _set(stack, owner, name, staticmethod(function))
    for owner in (vector, tiles):
        _set(stack, owner, "index_expr", staticmethod(_whole_index(owner)))
    for kernel in (scalar_kernel, vector_kernel):
        _set(stack, kernel, "get_to_dtype_expr", _narrowing(_require(kernel, "get_to_dtype_expr")))
    _set(stack, group, "codegen_group", _including(_require(group, "codegen_group")))


def _require(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise CodegenError(
            f"torch {torch.__version__}: {getattr(owner, '__name__', owner)}.{name} is missing, and without it CPU "
            f"kernels cannot be pinned. Use a torch release that bicompile supports."
        )
    return getattr(owner, name)


def _set(stack: contextlib.ExitStack, owner: type, name: str, value: Any) -> None:
    """Set a class attribute and schedule its restoration."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)


def _call(name: str, *arguments: Any) -> str:
    return f"bicompile::inductor::{name}({', '.join(str(a) for a in arguments)})"


def _is_real(*arguments: Any) -> bool:
    dtypes = [getattr(a, "dtype", None) for a in arguments]
    return any(d is not None and d.is_floating_point for d in dtypes)


def _ours(name: str) -> Callable[..., str]:
    return lambda *arguments: _call(name, *arguments)


def _ours_if_real(name: str, owner: type) -> Callable[..., Any]:
    stock = getattr(owner, name)

    def function(*arguments: Any) -> Any:
        if not _is_real(*arguments) or (name in ("add", "mul") and not _two_nans_can_meet(name)):
            return stock(*arguments)
        return _call(_OURS_IF_REAL[name], *arguments)

    return function


def _is_number(operand: Any) -> bool:
    """Whether a node is a constant that is not NaN."""
    return getattr(operand, "target", None) == "constant" and operand.args[1] == operand.args[1]


def _two_nans_can_meet(name: str) -> bool:
    """Whether the sum or product that is being generated could show which of two NaNs it returned."""
    node = getattr(cpp.V.interpreter, "current_node", None)
    if node is None or node.target != name:
        return True
    operands = node.args[1:]
    if operands[0] is operands[1] or any(_is_number(operand) for operand in operands):
        return False
    # A cast to a half precision writes the one NaN.
    return not all(u.target == "to_dtype" and (u.args[2:3] or [None])[0] in _HALVES for u in node.users)


def _each(name: str, scalar: type) -> Callable[..., str]:
    """Inductor's scalar code in a lambda, which ``each`` calls lane by lane."""
    stock = getattr(scalar, name)

    def function(*arguments: Any) -> str:
        if len(arguments) > 2:
            return _refused(name)(*arguments)
        parameters = [f"lane{i}" for i in range(len(arguments))]
        body = stock(*parameters)
        return _call("each", f"[](auto {', auto '.join(parameters)}) {{ return {body}; }}", *arguments)

    return function


def _round_to_int(
    x: Any, dtype: torch.dtype, src_dtype: torch.dtype | None = None, use_compute_types: bool = True
) -> Any:
    """To nearest even: Inductor's scalar code rounds halves away from zero, its vector code does not."""
    return cpp.ops.to_dtype(cpp.ops.round(x), dtype, src_dtype=src_dtype, use_compute_types=use_compute_types)


def _integers_only(name: str, owner: type) -> Callable[..., Any]:
    stock = getattr(owner, name)

    def function(*arguments: Any) -> Any:
        return _refused(name)(*arguments) if _is_real(*arguments) else stock(*arguments)

    return function


def _refused(name: str) -> Callable[..., Any]:
    def function(*arguments: Any, **options: Any) -> Any:
        from bicompile.errors import UnsupportedOpError

        raise UnsupportedOpError(
            f"ops.{name}: Inductor's C++ kernels have no form of this function that is known to give the same bits "
            f"in vector and scalar code, so a row's bits could follow its batch. Compute it outside the compiled "
            f"function, or from functions that are supported."
        )

    return function


def _whole_index(owner: Any) -> Callable[..., Any]:
    """Indices as integers first: vector code would add up a floating-point index in steps, which rounds.

    What is no integer is a number made of symbolic sizes, which Python computes in float64.
    """
    stock = owner.index_expr

    def index_expr(expr: Any, dtype: torch.dtype) -> Any:
        if not dtype.is_floating_point:
            return stock(expr, dtype)
        exact = torch.int64 if expr.is_integer else torch.float64
        return cpp.ops.to_dtype(stock(expr, exact), dtype, src_dtype=exact)

    return index_expr


def _narrowing(stock: Callable[..., str]) -> Callable[..., str]:
    """Casts that vector code does otherwise: NaN in the half precisions, overflow in 8 bits."""

    def get_to_dtype_expr(
        self: Any, src: Any, dtype: torch.dtype, src_dtype: torch.dtype | None, *more: Any, **kw: Any
    ) -> str:
        for d in (dtype, src_dtype):
            if d is not None and d.is_floating_point and d.itemsize == 1:  # index_expr gives no source
                _refused(f"to_dtype({d})")()
        expression = stock(self, src, dtype, src_dtype, *more, **kw)
        if dtype in _HALVES and src_dtype in (torch.float32, torch.float64):
            return _call("narrowed", src, expression)
        if dtype in _BYTES and src_dtype not in (dtype, torch.bool):
            return _call("low_bits", src, expression)
        return expression

    return get_to_dtype_expr


def _including(stock: Callable[..., str]) -> Callable[..., str]:
    """Kernels that call us include our header, by a path that names its contents."""

    def codegen_group(self: Any, *arguments: Any, **options: Any) -> str:
        _check_flags()
        code = stock(self, *arguments, **options)
        if "bicompile::" not in code:
            return code
        if _PREFIX not in code:
            raise CodegenError(f"torch {torch.__version__}: generated C++ kernels do not begin with {_PREFIX}")
        return code.replace(_PREFIX, f'{_PREFIX}\n#include "{materialise_headers()}"', 1)

    return codegen_group


def _check_flags() -> None:
    """Multiplications and additions must stay two roundings, in the order written; integers must wrap around."""
    contract = config.cpp.enable_floating_point_contract_flag
    unsafe = getattr(config.cpp, "enable_unsafe_math_opt_flag", False)
    if contract != CONTRACT_FLAG or unsafe:
        from bicompile.errors import OptionError

        raise OptionError(
            f"cpp.enable_floating_point_contract_flag={contract!r}, cpp.enable_unsafe_math_opt_flag={unsafe!r}: "
            f"expected {CONTRACT_FLAG!r} and False, because the C++ compiler would round differently from kernel to "
            f"kernel, or take it that integers never overflow. Unset both."
        )
