"""What a matrix product on a GPU is asked to do: sizes, strides, dtypes; all that the choice of a schedule may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNED = 16
"""Bytes: what a vector load and the tensor memory accelerator ask of addresses and row steps."""

INT32 = 2**31
_LARGEST_BLOCK = 512


@dataclass(frozen=True)
class Factor:
    """A factor ``[B, rows, columns]`` in memory.

    Attributes:
        step: elements from one matrix to the next.
        row, column: strides in elements.
        aligned: whether its address is divisible by 16.
    """

    step: int
    row: int
    column: int
    aligned: bool


@dataclass(frozen=True)
class Problem:
    """``out[i] = a[i] @ b[i]``, ``[B, M, K] @ [B, K, N]``.

    Attributes:
        dtype: of the factors.
        out: dtype of the result.
        tf32: whether float32 factors are rounded to TF32.
        add: whether an addend is added.
        wide: whether offsets inside a tile may need 64 bits.
    """

    dtype: torch.dtype
    out: torch.dtype
    batch: int
    m: int
    n: int
    k: int
    a: Factor
    b: Factor
    tf32: bool = False
    add: bool = False
    wide: bool = False

    @property
    def a_by_k(self) -> bool:
        """Whether neighbouring k of ``a`` are neighbours in memory."""
        return self.a.column == 1

    @property
    def b_by_k(self) -> bool:
        """Whether neighbouring k of ``b`` are neighbours in memory, as of the weight of ``nn.Linear``."""
        return self.b.row == 1

    @property
    def layout(self) -> str:
        """Which factors lie transposed, in the words of BLAS: ``tn`` is ``x @ weight.T``, ``nn`` a plain product."""
        return ("t" if self.b_by_k else "n") + ("n" if self.a_by_k else "t")

    @property
    def a_step(self) -> int:
        """Elements from one contiguous line of ``a`` to the next; 0 where no dim is contiguous."""
        return self.a.row if self.a_by_k else self.a.column if self.a.row == 1 else 0

    @property
    def b_step(self) -> int:
        """Elements from one contiguous line of ``b`` to the next; 0 where no dim is contiguous."""
        return self.b.column if self.b_by_k else self.b.row if self.b.column == 1 else 0

    @property
    def is_dense(self) -> bool:
        """Whether each factor has a contiguous dim whose lines do not overlap, as a BLAS library asks."""
        a_line, b_line = self.k if self.a_by_k else self.m, self.k if self.b_by_k else self.n
        return self.a_step >= max(a_line, 1) and self.b_step >= max(b_line, 1)

    @property
    def is_aligned(self) -> bool:
        """Whether every line of both factors begins at an address divisible by 16."""
        steps = (self.a_step, self.b_step, *((self.a.step, self.b.step) if self.batch > 1 else ()))
        return self.a.aligned and self.b.aligned and all(step * self.dtype.itemsize % ALIGNED == 0 for step in steps)


def problem_of(a: Tensor, b: Tensor, out: torch.dtype, tf32: bool, add: bool) -> Problem:
    """The problem of ``a @ b``, both 2-D or both 3-D; strides of dims of size 1 mean nothing, and become plain."""
    batch, (m, k), n = (a.shape[0] if a.dim() == 3 else 1), a.shape[-2:], b.shape[-1]
    a_row, a_column = a.stride()[-2:]
    b_row, b_column = b.stride()[-2:]
    if k == 1:
        a_column, b_row = 1, max(n, 1) if b_column == 1 else 1
    if m == 1:
        a_row = -(-k // ALIGNED) * ALIGNED if a_column == 1 else 1
    if n == 1:
        b_column = -(-k // ALIGNED) * ALIGNED if b_row == 1 else 1
    steps = (a.stride(0), b.stride(0)) if batch > 1 else (0, 0)
    left = Factor(steps[0], a_row, a_column, a.data_ptr() % ALIGNED == 0)
    right = Factor(steps[1], b_row, b_column, b.data_ptr() % ALIGNED == 0)
    wide = max(a_row, a_column, b_row, b_column) * _LARGEST_BLOCK >= INT32
    return Problem(a.dtype, out, batch, m, n, k, left, right, tf32, add, wide)


def can_stream(problem: Problem) -> bool:
    """Whether the tensor memory accelerator can load and store this problem."""
    p = problem
    sizes = min(p.m, p.n, p.k) > 0 and max(p.m, p.n, p.k) < INT32
    aligned = p.is_aligned and p.n * p.out.itemsize % ALIGNED == 0
    return p.batch == 1 and p.dtype.itemsize <= 2 and sizes and p.is_dense and aligned
