"""The scatter ops: contributions added to the destinations that integer indices name, in one fixed order.

``segment_add`` is the kernel under ``index_put_accumulate``, whose several broadcast indices become one here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_REDUCTIONS = ("sum", "prod", "mean", "amax", "amin")
for _schema in (
    "index_add(Tensor self, int dim, Tensor index, Tensor source, float alpha) -> Tensor",
    "scatter_add(Tensor self, int dim, Tensor index, Tensor src) -> Tensor",
    "scatter_reduce(Tensor self, int dim, Tensor index, Tensor src, str reduce, bool include_self) -> Tensor",
    "segment_add(Tensor self, Tensor index, Tensor values) -> Tensor",
    "index_put_accumulate(Tensor self, Tensor?[] indices, Tensor values) -> Tensor",
    "embedding_dense_backward(Tensor grad, Tensor indices, SymInt num_weights, SymInt padding_idx, "
    "bool scale_grad_by_freq) -> Tensor",
):
    _LIB.define(_schema, tags=_TAGS)


@torch.library.register_fake("bicompile::index_add", lib=_LIB)
def _(self: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    _check("index_add", self, dim, index, source)
    torch._check(index.dim() <= 1, lambda: f"bicompile::index_add: expected a 1-D index, got {index.dim()} dims")
    torch._check(
        source.dim() == self.dim(),
        lambda: f"bicompile::index_add: expected a source of {self.dim()} dims as self, got {source.dim()}",
    )
    return self.new_empty(self.shape)


@torch.library.register_fake("bicompile::scatter_add", lib=_LIB)
def _(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    _check("scatter_add", self, dim, index, src)
    return self.new_empty(self.shape)


@torch.library.register_fake("bicompile::scatter_reduce", lib=_LIB)
def _(self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool) -> Tensor:
    _check("scatter_reduce", self, dim, index, src)
    torch._check(
        reduce in _REDUCTIONS,
        lambda: f"bicompile::scatter_reduce: expected reduce to be one of {', '.join(_REDUCTIONS)}, got {reduce!r}",
    )
    return self.new_empty(self.shape)


@torch.library.register_fake("bicompile::segment_add", lib=_LIB)
def _(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    _check("segment_add", self, 1, index, values)
    torch._check(
        self.dim() == 3 and values.dim() == 3 and index.dim() == 1,
        lambda: (
            "bicompile::segment_add: expected self [outer, m, width], index [n] and values [outer, n, width], got "
            f"{self.dim()}, {index.dim()} and {values.dim()} dims"
        ),
    )
    return self.new_empty(self.shape)


@torch.library.register_fake("bicompile::index_put_accumulate", lib=_LIB)
def _(self: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> Tensor:
    _check_values("index_put_accumulate", self, values)
    _check_number_of_indices(self, indices)
    return self.new_empty(self.shape)


@torch.library.register_fake("bicompile::embedding_dense_backward", lib=_LIB)
def _(grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    torch._check(
        grad.dim() == indices.dim() + 1,
        lambda: (
            "bicompile::embedding_dense_backward: expected a grad of the shape of indices and one dim more, got "
            f"{grad.dim()} dims for {indices.dim()}"
        ),
    )
    return grad.new_empty(num_weights, grad.shape[-1])


def _check(op: str, self: Tensor, dim: int, index: Tensor, source: Tensor) -> None:
    rank = max(self.dim(), 1)
    torch._check(
        -rank <= dim < rank,
        lambda: f"bicompile::{op}: expected a dim in [{-rank}, {rank}) for shape {tuple(self.shape)}, got {dim}",
    )
    torch._check(
        index.dtype in (torch.int64, torch.int32),
        lambda: f"bicompile::{op}: expected int64 or int32 indices, got {index.dtype}; convert them with .long()",
    )
    _check_values(op, self, source)


def _check_values(op: str, self: Tensor, source: Tensor) -> None:
    torch._check(
        self.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        lambda: (
            f"bicompile::{op}: expected float32, float64, bfloat16 or float16, got {self.dtype}; "
            "use torch's own op for integers, it is exact"
        ),
    )
    torch._check(
        source.dtype == self.dtype,
        lambda: f"bicompile::{op}: expected a source of dtype {self.dtype} as self, got {source.dtype}",
    )


def _check_number_of_indices(self: Tensor, indices: Sequence[Tensor | None]) -> None:
    dims = sum(i.dim() if i is not None and i.dtype in (torch.bool, torch.uint8) else 1 for i in indices)
    torch._check(
        dims <= self.dim() and any(i is not None for i in indices),
        lambda: f"bicompile::index_put_accumulate: expected indices for 1 to {self.dim()} dims, got {dims}",
    )


def _index_put_accumulate(self: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> Tensor:
    """Make one index of several: the indexed dims become one, between the dims before and after them."""
    _check_values("index_put_accumulate", self, values)
    _check_number_of_indices(self, indices)
    by_dim = _one_index_per_dim(self, indices)
    indexed = [dim for dim, index in enumerate(by_dim) if index is not None]
    # Indexed dims that lie apart go to the front, as their result does in self[indices].
    apart = indexed != list(range(indexed[0], indexed[-1] + 1))
    before = 0 if apart else indexed[0]
    rest = [dim for dim in range(self.dim()) if dim not in indexed]
    order = rest[:before] + indexed + rest[before:]
    linear, shape = _linear_index(self, by_dim, indexed)

    moved = self.permute(order)
    outer, inner = moved.shape[:before], moved.shape[before + len(indexed) :]
    named = moved.shape[before : before + len(indexed)]
    place = (*outer, *shape, *inner)
    try:
        spread = values.expand(place)
    except RuntimeError as error:
        raise ValueError(
            f"bicompile::index_put_accumulate: expected values that broadcast to {tuple(place)}, the shape of "
            f"self[indices], got {tuple(values.shape)}"
        ) from error
    out = torch.ops.bicompile.segment_add(
        moved.reshape(outer.numel(), named.numel(), inner.numel()),
        linear,
        spread.reshape(outer.numel(), linear.numel(), inner.numel()),
    )
    back = sorted(range(self.dim()), key=order.__getitem__)
    return out.view(moved.shape).permute(back).contiguous()


def _one_index_per_dim(self: Tensor, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks become the coordinates of their true elements; dims without an index get None.

    Those are counted first, so on a GPU a mask waits for it, and cannot be captured in a CUDA graph.
    """
    by_dim: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype not in (torch.bool, torch.uint8):
            by_dim.append(index)
            continue
        covered = self.shape[len(by_dim) : len(by_dim) + index.dim()]
        if index.shape != covered:
            raise ValueError(
                f"bicompile::index_put_accumulate: expected a mask of shape {tuple(covered)} for dim {len(by_dim)}, "
                f"got {tuple(index.shape)}"
            )
        by_dim.extend(index.nonzero().unbind(1))
    return by_dim + [None] * (self.dim() - len(by_dim))


def _linear_index(self: Tensor, by_dim: list[Tensor | None], indexed: list[int]) -> tuple[Tensor, torch.Size]:
    """The indices of several dims as one into their product, flat, and the shape to which they broadcast."""
    given = torch.broadcast_tensors(*(index for index in by_dim if index is not None))
    linear = torch.zeros(given[0].shape, dtype=torch.int64, device=self.device)
    for dim, index in zip(indexed, given, strict=True):
        if index.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"bicompile::index_put_accumulate: expected int64, int32 or bool indices, got {index.dtype}"
            )
        index = index.to(self.device)  # torch takes CPU indices for a tensor on a GPU
        linear = linear * self.shape[dim] + _in_range(index, self.shape[dim], dim)
    return linear.reshape(-1), given[0].shape


def _in_range(index: Tensor, size: int, dim: int) -> Tensor:
    """``index`` as int64, negative ones counted from the end, all checked; on a GPU by an assertion there."""
    if index.is_cuda:
        from .gpu import checked_index

        return checked_index(index, size)
    wide = index.long()
    if wide.numel() and not (-size <= int(wide.min()) and int(wide.max()) < size):
        raise IndexError(
            f"bicompile::index_put_accumulate: expected indices in [{-size}, {size}) for dim {dim}, got "
            f"{int(wide.min())} to {int(wide.max())}"
        )
    return torch.where(wide < 0, wide + size, wide)


# -- On a GPU: the checks that the CPU kernels make for themselves, then the kernels ----------------------------------


def _index_add_cuda(self: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    from .gpu import index_add

    _check("index_add", self, dim, index, source)
    _check_slices("index_add", self, dim, index, source)
    return index_add(self, dim, index, source, alpha)


def _segment_add_cuda(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    from .gpu import segment_add

    _check("segment_add", self, 1, index, values)
    torch._check(
        self.dim() == 3 and values.shape == (self.shape[0], index.numel(), self.shape[2]) and index.dim() == 1,
        lambda: (
            "bicompile::segment_add: expected self [outer, m, width], index [n] and values [outer, n, width], got "
            f"{list(self.shape)}, {list(index.shape)} and {list(values.shape)}"
        ),
    )
    return segment_add(self, index, values)


def _scatter_add_cuda(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    from .gpu import scatter_reduce

    _check("scatter_add", self, dim, index, src)
    _check_elements("scatter_add", self, dim, index, src)
    return scatter_reduce(self, dim, index, src, "sum", True)


def _scatter_reduce_cuda(self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool) -> Tensor:
    from .gpu import scatter_reduce

    _check("scatter_reduce", self, dim, index, src)
    _check_elements("scatter_reduce", self, dim, index, src)
    torch._check(
        reduce in _REDUCTIONS,
        lambda: f"bicompile::scatter_reduce: expected reduce to be one of {', '.join(_REDUCTIONS)}, got {reduce!r}",
    )
    return scatter_reduce(self, dim, index, src, reduce, include_self)


def _embedding_dense_backward_cuda(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    from .gpu import embedding_dense_backward

    _check("embedding_dense_backward", grad, -1, indices, grad)
    torch._check(
        grad.shape[:-1] == indices.shape and num_weights >= 0,
        lambda: (
            "bicompile::embedding_dense_backward: expected a grad of the shape of indices and one dim more, and "
            f"num_weights >= 0, got {list(grad.shape)}, {list(indices.shape)} and {num_weights}"
        ),
    )
    return embedding_dense_backward(grad, indices, num_weights, padding_idx, scale_grad_by_freq)


def _check_slices(op: str, self: Tensor, dim: int, index: Tensor, source: Tensor) -> None:
    torch._check(index.dim() <= 1, lambda: f"bicompile::{op}: expected a 1-D index, got {index.dim()} dims")
    torch._check(
        self.dim() == source.dim(),
        lambda: f"bicompile::{op}: expected a source of {self.dim()} dims as self, got {source.dim()}",
    )
    wanted = list(self.shape)
    if self.dim():
        wanted[dim] = index.numel()
    torch._check(
        list(source.shape) == wanted and (self.dim() > 0 or index.numel() == 1),
        lambda: (
            f"bicompile::{op}: expected a source of shape {wanted} for {index.numel()} indices, got "
            f"{list(source.shape)}"
        ),
    )


def _check_elements(op: str, self: Tensor, dim: int, index: Tensor, src: Tensor) -> None:
    if index.numel() == 0:
        return
    torch._check(
        index.dim() == self.dim() == src.dim(),
        lambda: (
            f"bicompile::{op}: expected index and src of {self.dim()} dims as self, got {index.dim()} and {src.dim()}"
        ),
    )
    dim = dim % max(self.dim(), 1)
    torch._check(
        all(
            index.shape[d] <= src.shape[d] and (d == dim or index.shape[d] <= self.shape[d]) for d in range(self.dim())
        ),
        lambda: (
            f"bicompile::{op}: expected an index no larger than src and, but for dim {dim}, self; got "
            f"{list(index.shape)} for src {list(src.shape)} and self {list(self.shape)}"
        ),
    )


_LIB.impl("index_put_accumulate", _index_put_accumulate, "CPU")
_LIB.impl("index_put_accumulate", _index_put_accumulate, "CUDA")
_LIB.impl("index_add", _index_add_cuda, "CUDA")
_LIB.impl("segment_add", _segment_add_cuda, "CUDA")
_LIB.impl("scatter_add", _scatter_add_cuda, "CUDA")
_LIB.impl("scatter_reduce", _scatter_reduce_cuda, "CUDA")
_LIB.impl("embedding_dense_backward", _embedding_dense_backward_cuda, "CUDA")
