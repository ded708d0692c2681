"""Pooling as views and sums that the passes know.

A pooled mean adds its window in ascending order in float32, divides and rounds once.  Its gradient does the same over
the windows that an element belongs to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .images import MOST_TAPS, is_channels_last, laid_out, padded, per_dim, stuffed, taps_of, wide, windows_of

aten = torch.ops.aten


def _window_sums(x: Tensor, kernel: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The sum of each window of the trailing dims of ``x``, which is float32 or float64."""
    ones = [1] * len(kernel)
    if math.prod(kernel) <= MOST_TAPS:
        return functools.reduce(torch.add, taps_of(x, kernel, strides, ones))
    windows = windows_of(x, kernel, strides, ones)
    return windows.sum(list(range(windows.dim() - len(kernel), windows.dim())))


def _window_counts(
    x: Tensor, size: Any, outputs: Any, kernel: int, stride: int, padding: int, include_pad: bool
) -> Tensor:
    """How many elements each window along one dim has, padding counted or not, never what lies beyond it."""
    start = torch.arange(outputs, device=x.device) * stride - padding
    end = (start + kernel).clamp(max=size + padding)
    return end - start if include_pad else end.clamp(max=size) - start.clamp(min=0)


def _divisors(
    x: Tensor,
    sizes: Sequence[Any],
    outputs: Sequence[Any],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    include_pad: bool,
    override: int | None,
) -> Tensor | int:
    """What the sum of each window is divided by."""
    if override is not None:
        return override
    if include_pad and all(
        (o - 1) * s + k <= n + 2 * p for n, o, k, s, p in zip(sizes, outputs, kernel, stride, padding, strict=True)
    ):
        return math.prod(kernel)
    total: Tensor | int = 1
    for dim, n in enumerate(sizes):
        counts = _window_counts(x, n, outputs[dim], kernel[dim], stride[dim], padding[dim], include_pad)
        total = total * counts.reshape(-1, *[1] * (len(sizes) - 1 - dim))
    return total


def _pool_outputs(
    sizes: Sequence[Any], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> list[Any]:
    outputs = []
    for n, k, s, p in zip(sizes, kernel, stride, padding, strict=True):
        count = (n + 2 * p - k + (s - 1 if ceil_mode else 0)) // s + 1
        # The last window must start inside the input or its left padding.
        outputs.append(count - 1 if ceil_mode and (count - 1) * s >= n + p else count)
    return outputs


def _reaching(kernel: Sequence[int], sizes: Sequence[Any], padding: Sequence[int]) -> list[int]:
    """The kernel without what is beyond the input and its padding where a window may end there: ``ceil_mode``."""
    return [int(n + 2 * p) if k > n + 2 * p else k for k, n, p in zip(kernel, sizes, padding, strict=True)]


def _mean_pool(dims: int) -> Callable[..., Tensor]:
    def avg_pool(
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Tensor:
        if not x.is_floating_point():
            return NotImplemented
        kernel = per_dim(kernel_size, dims)
        strides, pads = per_dim(stride or kernel, dims), per_dim(padding, dims)
        sizes = x.shape[-dims:]
        outputs = _pool_outputs(sizes, kernel, strides, pads, ceil_mode)
        reach = _reaching(kernel, sizes, pads)
        after = [(o - 1) * s + k - n - p for o, s, k, n, p in zip(outputs, strides, reach, sizes, pads, strict=True)]
        sums = _window_sums(padded(wide(x), pads, after), reach, strides)
        divisor = _divisors(x, sizes, outputs, kernel, strides, pads, count_include_pad, divisor_override)
        return _like(x, (sums / divisor).to(x.dtype))

    return avg_pool


def _mean_pool_backward(dims: int) -> Callable[..., Tensor]:
    def avg_pool_backward(
        grad: Tensor,
        x: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        kernel = per_dim(kernel_size, dims)
        strides, pads = per_dim(stride or kernel, dims), per_dim(padding, dims)
        sizes, outputs = x.shape[-dims:], grad.shape[-dims:]
        divisor = _divisors(x, sizes, outputs, kernel, strides, pads, count_include_pad, divisor_override)
        shares = stuffed(wide(grad) / divisor, strides)
        reach = _reaching(kernel, sizes, pads)
        before = [k - 1 - p for k, p in zip(reach, pads, strict=True)]
        after = [n + p - (o - 1) * s - 1 for n, p, o, s in zip(sizes, pads, outputs, strides, strict=True)]
        sums = _window_sums(padded(shares, before, after), reach, [1] * dims)
        return _like(x, sums.to(grad.dtype))

    return avg_pool_backward


def _adaptive_sums(x: Tensor, sizes: Sequence[int], outputs: Sequence[int]) -> Tensor:
    """Sums over the windows [i * size // output, ceil((i + 1) * size / output)) of the trailing dims."""
    dims = len(sizes)
    first = x.dim() - dims
    index: list[Any] = [None] * first
    inside: Tensor | None = None
    kernel = []
    for dim, (n, o) in enumerate(zip(sizes, outputs, strict=True)):
        i = torch.arange(o, device=x.device)
        start, end = i * n // o, ((i + 1) * n + o - 1) // o
        kernel.append(max((j + 1) * n // o + (1 if (j + 1) * n % o else 0) - j * n // o for j in range(o)))
        at = start[:, None] + torch.arange(kernel[-1], device=x.device)
        shape = [1] * (2 * dims)
        shape[dim], shape[dims + dim] = o, kernel[-1]
        index.append(at.clamp(max=n - 1).reshape(shape))
        here = (at < end[:, None]).reshape(shape)
        inside = here if inside is None else inside & here
    assert inside is not None
    windows = torch.where(inside, aten.index.Tensor(x, index), 0.0)
    taps = math.prod(kernel)
    flat = windows.flatten(first + dims)
    return functools.reduce(torch.add, flat.unbind(-1)) if taps <= MOST_TAPS else flat.sum(-1)


def _adaptive_counts(x: Tensor, sizes: Sequence[int], outputs: Sequence[int]) -> Tensor | int:
    total: Tensor | int = 1
    for dim, (n, o) in enumerate(zip(sizes, outputs, strict=True)):
        i = torch.arange(o, device=x.device)
        counts = ((i + 1) * n + o - 1) // o - i * n // o
        total = total * counts.reshape(-1, *[1] * (len(sizes) - 1 - dim))
    return total


def _adaptive_mean_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    dims = len(output_size)
    sizes, outputs = [int(n) for n in x.shape[-dims:]], [int(n) for n in output_size]
    if 0 in outputs or x.numel() == 0:
        return x.new_empty(*x.shape[:-dims], *outputs)
    sums = _adaptive_sums(wide(x), sizes, outputs)
    return _like(x, (sums / _adaptive_counts(x, sizes, outputs)).to(x.dtype))


def _adaptive_mean_pool_backward(dims: int) -> Callable[[Tensor, Tensor], Tensor]:
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        sizes, outputs = [int(n) for n in x.shape[-dims:]], [int(n) for n in grad.shape[-dims:]]
        if grad.numel() == 0:
            return torch.zeros_like(x)
        shares = wide(grad) / _adaptive_counts(x, sizes, outputs)
        # Element i lies in the windows [i * output // size, ceil((i + 1) * output / size)): the same rule again.
        return _like(x, _adaptive_sums(shares, outputs, sizes).to(grad.dtype))

    return backward


def _max_pool_backward(dims: int) -> Callable[..., Tensor]:
    def backward(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
        indices = rest[-1]
        lead = x.shape[:-dims]
        zeros = grad.new_zeros(*lead, math.prod(x.shape[-dims:]))
        summed = zeros.scatter_add(-1, indices.flatten(-dims), grad.flatten(-dims))
        return _like(x, summed.view(x.shape))

    return backward


def _replication_pad_backward(dims: int) -> Callable[[Tensor, Tensor, Sequence[int]], Tensor]:
    def backward(grad: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
        """Each edge takes the gradients of its copies, from the first to the last, dim by dim."""
        total = wide(grad)
        for dim in range(-dims, 0):
            before = padding[2 * (-dim - 1)]
            size = x.shape[dim]
            at = (torch.arange(total.shape[dim], device=x.device) - before).clamp(0, size - 1)
            shape = list(total.shape)
            shape[dim] = size
            total = torch.index_add(total.new_zeros(shape), dim, at, total)
        return _like(x, total.to(grad.dtype))

    return backward


def _like(x: Tensor, result: Tensor) -> Tensor:
    """``result`` laid out as PyTorch lays out what it pools from ``x``."""
    return laid_out(result, is_channels_last(x))


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten.avg_pool2d.default: _mean_pool(2),
    aten.avg_pool3d.default: _mean_pool(3),
    aten.avg_pool2d_backward.default: _mean_pool_backward(2),
    aten.avg_pool3d_backward.default: _mean_pool_backward(3),
    aten._adaptive_avg_pool2d.default: _adaptive_mean_pool,
    aten._adaptive_avg_pool3d.default: _adaptive_mean_pool,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_mean_pool_backward(2),
    aten._adaptive_avg_pool3d_backward.default: _adaptive_mean_pool_backward(3),
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward(2),  # torch 2.11 has no form of its own
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward(3),
    aten.adaptive_max_pool2d_backward.default: _max_pool_backward(2),
    aten.adaptive_max_pool3d_backward.default: _max_pool_backward(3),
    aten.replication_pad1d_backward.default: _replication_pad_backward(1),
    aten.replication_pad2d_backward.default: _replication_pad_backward(2),
    aten.replication_pad3d_backward.default: _replication_pad_backward(3),
}
