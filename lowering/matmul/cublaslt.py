"""cuBLASLt through ctypes: the algorithms that it offers for a product, and how to run one.

Only a binding.  What an algorithm adds in which order is not documented; ``admission`` finds out, and none is used
that was not found to realise our order.  Algorithms that split K over programs are not asked for.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from ctypes import byref, c_double, c_float, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

# cublasComputeType_t, cudaDataType_t and the attributes of cublasLt.h.
_COMPUTE_32F, _COMPUTE_64F, _COMPUTE_32F_FAST_TF32 = 68, 70, 77
_DATA = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 14}
_DESC_TRANSPOSE_A, _DESC_TRANSPOSE_B = 3, 4
_LAYOUT_BATCH_COUNT, _LAYOUT_BATCH_STRIDE = 5, 6
_PREFERENCE_WORKSPACE, _PREFERENCE_REDUCTION_SCHEMES, _PREFERENCE_FACTORS, _PREFERENCE_OUTS = 1, 3, (5, 6), (7, 8)
_NO_SCHEME, _TRANSPOSED = 0, 1
_NO_WORKSPACE = c_size_t(0)
_CONFIG = (  # attribute, name, type
    (0, "id", c_int32),
    (1, "tile", c_uint32),
    (6, "stages", c_uint32),
    (2, "split_k", c_int32),
    (3, "scheme", c_uint32),
    (4, "swizzle", c_uint32),
    (5, "custom", c_uint32),
    (7, "inner", c_uint16),
    (8, "cluster", c_uint16),
)


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", c_size_t),
        ("state", c_int32),
        ("waves", c_float),
        ("reserved", c_int32 * 4),
    ]


class CublasLtError(RuntimeError):
    """A call of cuBLASLt that did not succeed."""


@dataclass(frozen=True)
class Product:
    """``out[b] = left[b] @ right[b]`` as cuBLASLt sees it: row-major ``[m, k]``, ``[k, n]`` and ``[m, n]``.

    Attributes:
        left_transposed, right_transposed: whether that factor lies in memory as ``[k, m]`` or ``[n, k]``.
        left_step, right_step, out_step: elements from one row in memory to the next.
        left_batch, right_batch, out_batch: elements from one matrix to the next.
        tf32: whether float32 factors are rounded to TF32.
        factor_alignment, out_alignment: bytes by which addresses and row steps are divisible, powers of two.
    """

    dtype: torch.dtype
    m: int
    n: int
    k: int
    left_transposed: bool
    right_transposed: bool
    left_step: int
    right_step: int
    out_step: int
    batch: int = 1
    left_batch: int = 0
    right_batch: int = 0
    out_batch: int = 0
    tf32: bool = False
    factor_alignment: int = 16
    out_alignment: int = 16


@dataclass(frozen=True)
class Config:
    """What tells one algorithm from another: everything cuBLASLt says about its configuration."""

    id: int
    tile: int
    stages: int
    split_k: int
    scheme: int
    swizzle: int
    custom: int
    inner: int
    cluster: int


class Algorithm:
    """One algorithm for one product, ready to run."""

    def __init__(self, setup: _Setup, algorithm: _Algorithm, config: Config) -> None:
        self.config = config
        self._setup = setup  # keeps the descriptors alive
        self._algorithm = algorithm
        scalar = c_double if setup.product.dtype == torch.float64 else c_float
        self._one, self._zero = scalar(1.0), scalar(0.0)
        self._matmul = _library().cublasLtMatmul
        self._head = (setup.handle, setup.desc, byref(self._one))
        self._tail = (byref(self._algorithm),)
        self._beta = byref(self._zero)

    def moved_to(self, product: Product, device: int) -> Algorithm:
        """The same algorithm for a product of other sizes.

        Raises:
            CublasLtError: it cannot compute that one.
        """
        setup, checked = _Setup(product, device), _Heuristic()
        layouts = (setup.right, setup.left, setup.out, setup.out)
        arguments = (setup.handle, setup.desc, *layouts, byref(self._algorithm), byref(checked))
        _call("cublasLtMatmulAlgoCheck", *arguments)
        if checked.workspace:
            raise CublasLtError(f"{self.config} needs a workspace for {product}")
        return Algorithm(setup, self._algorithm, self.config)

    def __call__(self, left: int, right: int, out: int, stream: int) -> None:
        """Run on addresses.

        Raises:
            CublasLtError: cuBLASLt refused the call.
        """
        s = self._setup
        # Row-major is cuBLASLt's column-major transposed, so the factors change places.
        status = self._matmul(
            *self._head,
            c_void_p(right),
            s.right,
            c_void_p(left),
            s.left,
            self._beta,
            c_void_p(out),
            s.out,
            c_void_p(out),
            s.out,
            *self._tail,
            None,
            _NO_WORKSPACE,
            c_void_p(stream),
        )
        _check("cublasLtMatmul", status)


class _Setup:
    """The descriptors of a product."""

    def __init__(self, product: Product, device: int) -> None:
        self.product = product
        self.handle = _handle(device)
        self.desc, self.left, self.right, self.out = c_void_p(), c_void_p(), c_void_p(), c_void_p()
        layouts = (self.left, self.right, self.out)
        weakref.finalize(self, _release, _library(), self.desc, layouts).atexit = False  # the process ends anyway
        p, data = product, _DATA[product.dtype]
        scale = _DATA[torch.float64 if p.dtype == torch.float64 else torch.float32]
        compute = _COMPUTE_64F if p.dtype == torch.float64 else _COMPUTE_32F_FAST_TF32 if p.tf32 else _COMPUTE_32F
        _call("cublasLtMatmulDescCreate", byref(self.desc), compute, scale)
        if p.right_transposed:
            _set("cublasLtMatmulDescSetAttribute", self.desc, _DESC_TRANSPOSE_A, c_int32(_TRANSPOSED))
        if p.left_transposed:
            _set("cublasLtMatmulDescSetAttribute", self.desc, _DESC_TRANSPOSE_B, c_int32(_TRANSPOSED))
        for layout, rows, columns, swapped, step, batch in (
            (self.right, p.n, p.k, p.right_transposed, p.right_step, p.right_batch),
            (self.left, p.k, p.m, p.left_transposed, p.left_step, p.left_batch),
            (self.out, p.n, p.m, False, p.out_step, p.out_batch),
        ):
            if swapped:
                rows, columns = columns, rows
            sizes = (c_uint64(rows), c_uint64(columns), c_int64(step))
            _call("cublasLtMatrixLayoutCreate", byref(layout), data, *sizes)
            if p.batch != 1:
                _set("cublasLtMatrixLayoutSetAttribute", layout, _LAYOUT_BATCH_COUNT, c_int32(p.batch))
                _set("cublasLtMatrixLayoutSetAttribute", layout, _LAYOUT_BATCH_STRIDE, c_int64(batch))


def _release(library: Any, desc: c_void_p, layouts: tuple[c_void_p, ...]) -> None:
    """Destroy what was created of a product's descriptors."""
    if desc:
        library.cublasLtMatmulDescDestroy(desc)
    for layout in layouts:
        if layout:
            library.cublasLtMatrixLayoutDestroy(layout)


def algorithms(product: Product, device: int, count: int) -> list[Algorithm]:
    """Up to ``count`` algorithms without a split of K or a workspace, the one that cuBLASLt thinks fastest first.

    Args:
        product: what is computed.
        device: the CUDA device, which must be the current one.
        count: how many to ask for.

    Raises:
        CublasLtError: cuBLASLt cannot describe this product.
    """
    setup = _Setup(product, device)
    preference = c_void_p()
    _call("cublasLtMatmulPreferenceCreate", byref(preference))
    found = (_Heuristic * count)()
    returned = c_int32()
    try:
        put = functools.partial(_set, "cublasLtMatmulPreferenceSetAttribute", preference)
        put(_PREFERENCE_WORKSPACE, c_uint64(0))
        put(_PREFERENCE_REDUCTION_SCHEMES, c_uint32(_NO_SCHEME))
        for attribute in _PREFERENCE_FACTORS:
            put(attribute, c_uint32(product.factor_alignment))
        for attribute in _PREFERENCE_OUTS:
            put(attribute, c_uint32(product.out_alignment))
        status = _library().cublasLtMatmulAlgoGetHeuristic(
            setup.handle,
            setup.desc,
            setup.right,
            setup.left,
            setup.out,
            setup.out,
            preference,
            count,
            found,
            byref(returned),
        )
    finally:
        _library().cublasLtMatmulPreferenceDestroy(preference)
    if status != 0:  # there is no algorithm
        return []
    usable = [entry.algorithm for entry in found[: returned.value] if entry.state == 0]
    pairs = [(algorithm, _config_of(algorithm)) for algorithm in usable]
    return [Algorithm(setup, algorithm, config) for algorithm, config in pairs if config.split_k in (0, 1)]


def version() -> int:
    """cuBLASLt's version, such as 130100."""
    library = _library()
    library.cublasLtGetVersion.restype = c_size_t
    return int(library.cublasLtGetVersion())


def available() -> bool:
    """Whether the cuBLASLt that torch uses is loaded."""
    try:
        _library()
    except OSError:
        return False
    return True


def _config_of(algorithm: _Algorithm) -> Config:
    values = {}
    for attribute, name, kind in _CONFIG:
        value, written = kind(), c_size_t()
        arguments = (byref(algorithm), attribute, byref(value), c_size_t(ctypes.sizeof(value)), byref(written))
        _call("cublasLtMatmulAlgoConfigGetAttribute", *arguments)
        values[name] = int(value.value)
    return Config(**values)


@functools.cache
def _library() -> Any:
    """The library that torch has loaded, found by its name; no other one is loaded."""
    major = (torch.version.cuda or "").split(".")[0]
    return ctypes.CDLL(f"libcublasLt.so.{major}", mode=os.RTLD_NOLOAD | os.RTLD_NOW)


@functools.cache
def _handle(device: int) -> c_void_p:
    """The handle for ``device``, which is the current one."""
    handle = c_void_p()
    _call("cublasLtCreate", byref(handle))
    return handle


def _call(name: str, *arguments: Any) -> None:
    _check(name, getattr(_library(), name)(*arguments))


def _set(name: str, target: c_void_p, attribute: int, value: Any) -> None:
    _call(name, target, attribute, byref(value), c_size_t(ctypes.sizeof(value)))


def _check(name: str, status: int) -> None:
    if status != 0:
        raise CublasLtError(f"{name} returned status {status}")
