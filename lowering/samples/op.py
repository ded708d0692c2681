"""Linear algebra and Fourier transforms: PyTorch's own kernels, one sample at a time.

A sample is one matrix, with its right-hand sides, or one signal.  Each is copied to fresh memory and computed by one
thread, so its neighbours, its place in memory and the number of threads cannot show.  Slow beside a call with the
whole batch, and right.  On the CPU only.

Every op here has the schema of the ATen op of its name.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_DIMS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        """
        _linalg_det _linalg_eigh _linalg_slogdet _linalg_svd cholesky cholesky_inverse linalg_cholesky_ex
        linalg_eig linalg_inv_ex linalg_ldl_factor_ex linalg_lu linalg_lu_factor_ex linalg_matrix_exp linalg_qr
        """.split(),
        (2,),
    ),
    "_linalg_solve_ex": (2, 2),
    "cholesky_solve": (2, 2),
    "linalg_householder_product": (2, 1),
    "linalg_ldl_solve": (2, 1, 2),
    "linalg_lu_solve": (2, 1, 2),
    "linalg_solve_triangular": (2, 2),
}
SAMPLE_DIMS = {name: dims for name, dims in _DIMS.items() if hasattr(torch.ops.aten, name)}  # 2.14 has no cholesky
"""How many of the last dims of each tensor argument are one sample; those before them broadcast."""

TRANSFORMS = ("_fft_c2c", "_fft_c2r", "_fft_r2c")
"""A sample is what lies along the dims that are transformed."""

OPS = (*SAMPLE_DIMS, *TRANSFORMS)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _matrices(name: str) -> Callable[..., Any]:
    op, dims = getattr(torch.ops.aten, name).default, SAMPLE_DIMS[name]

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors, rest = args[: len(dims)], args[len(dims) :]
        lasts = (2, 1) if name == "_linalg_solve_ex" and _is_vector(*tensors) else dims
        batch = torch.broadcast_shapes(*(t.shape[: t.dim() - n] for t, n in zip(tensors, lasts, strict=True)))
        spread = [t.expand(*batch, *t.shape[t.dim() - n :]) for t, n in zip(tensors, lasts, strict=True)]

        def compute(place: tuple[int, ...]) -> Any:
            return op(*(_fresh(t[place]) for t in spread), *rest, **kwargs)

        shape = op(*(t.to("meta") for t in tensors), *rest, **kwargs)
        if isinstance(shape, Tensor):
            return _filled([shape], batch, lambda place: [compute(place)])[0]
        return tuple(_filled(shape, batch, compute))

    return run


def _is_vector(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` is one vector, or one for each matrix in ``a``, as ``torch.linalg.solve`` has it."""
    return b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])


def _transforms(name: str) -> Callable[..., Tensor]:
    op = getattr(torch.ops.aten, name).default

    def run(x: Tensor, dim: Sequence[int], *rest: Any) -> Tensor:
        along = [d % x.dim() for d in dim]
        others = [d for d in range(x.dim()) if d not in along]
        order, moved = [*others, *along], x.permute(*others, *along)

        def compute(place: tuple[int, ...]) -> list[Tensor]:
            return [op(_fresh(moved[place]), list(range(len(along))), *rest)]

        shape = op(x.to("meta"), dim, *rest).permute(order)
        (result,) = _filled([shape], moved.shape[: len(others)], compute)
        return result.permute(sorted(range(x.dim()), key=order.__getitem__))

    return run


def _fresh(sample: Tensor) -> Tensor:
    return sample.clone(memory_format=torch.contiguous_format)


def _filled(shapes: Iterable[Tensor], batch: Sequence[int], compute: Callable[[tuple[int, ...]], Any]) -> list[Tensor]:
    """Tensors like ``shapes``, whose parts at every place of the batch are what ``compute`` gives there."""
    results = [torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype) for shape in shapes]
    with _one_thread():
        for place in itertools.product(*map(range, batch)):
            for result, part in zip(results, compute(place), strict=True):
                result[place].copy_(part)
    return results


def _register(name: str, run: Callable[..., Any]) -> None:
    aten = getattr(torch.ops.aten, name).default
    _LIB.define(str(aten._schema).removeprefix("aten::"), tags=_TAGS)
    _LIB.impl(name, run, "CPU")
    torch.library.register_fake(f"bicompile::{name}", aten, lib=_LIB)


for _name in SAMPLE_DIMS:
    _register(_name, _matrices(_name))
for _name in TRANSFORMS:
    _register(_name, _transforms(_name))
