"""Convolution as views and products that the passes know.

A convolution is a matrix product of the windows of all samples with the kernels of the output channels; what is summed
is (channel, kernel position), ascending.  So it has the order of ``lowering.matmul``, which the batch cannot reach.  On
a GPU Inductor writes out the windows, as rows; on a CPU ``lowering.windows`` packs them into the product, as columns.
A transposed convolution, and the gradient of a convolution's input, is for each of its phases (the remainders by the
stride) the convolution of the input with those positions of the flipped kernel that meet an element; of many phases, or
with a dilation, that of the stuffed input (zeros between its elements) with the whole kernel.  It too rounds once.  The
gradient of a weight sums over batch and positions, in ascending order.  A depthwise kernel is small: its products are
added position by position, in float32, which fuses.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .images import (
    MOST_TAPS,
    Image,
    interleaved,
    is_channels_last,
    laid_out,
    per_dim,
    taps_of,
    wide,
    windows_of,
)
from .lowering.windows.op import positions_of

aten = torch.ops.aten
# From so many positions on, a sample's product is large enough by itself (CPU).
_MANY_POSITIONS = 128
# A transposed convolution of a larger stride multiplies the zeros between its input's elements.
_MOST_PHASES = 16


def _columns(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], groups: int) -> Tensor:
    """[groups, N * positions, channels of a group * kernel] of a padded ``x`` [N, C, *S]."""
    dims = len(kernel)
    windows = windows_of(x, kernel, strides, dilations).unflatten(1, (groups, -1))
    # [N, G, C/G, *positions, *kernel] -> [G, N, *positions, C/G, *kernel]
    order = [1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    windows = windows.permute(order)
    # Sizes are said, not left to be inferred: what comes out of a quotient of unknown sizes is hard to reason about.
    return windows.reshape(groups, math.prod(windows.shape[1 : 2 + dims]), math.prod(windows.shape[2 + dims :]))


def _rows(x: Tensor, groups: int) -> Tensor:
    """``x`` [N, C, *S] as [groups, N * S, C / groups]."""
    split = x.unflatten(1, (groups, -1))
    split = split.permute(1, 0, *range(3, split.dim()), 2)
    return split.reshape(groups, math.prod(split.shape[1:-1]), split.shape[-1])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a[g] @ b[g]`` for each group; one group is a plain product, which has the same bits."""
    return torch.mm(a[0], b[0]).unsqueeze(0) if a.shape[0] == 1 else torch.bmm(a, b)


def _convolve(
    image: Image, weight: Tensor, strides: Sequence[int], dilations: Sequence[int], groups: int, channels_last: bool
) -> Tensor:
    """The convolution of [N, C, *S] with ``weight`` [O, C / groups, *kernel]."""
    kernel, outputs, samples = weight.shape[2:], weight.shape[0], image.x.shape[0]
    positions = positions_of(image.sizes, kernel, strides, dilations)
    factors = weight.reshape(groups, outputs // groups, -1)
    if weight.shape[1] == 1 and groups > 1 and math.prod(kernel) <= MOST_TAPS:
        y = _convolve_depthwise(image.written_out(), weight, strides, dilations)
    elif image.x.device.type == "cpu":
        y = _products_of_windows(image, factors, kernel, strides, dilations, positions)
    else:
        columns = _columns(image.written_out(), kernel, strides, dilations, groups)
        # [G, rows, O/G] -> [G, N, *positions, O/G] -> [N, G, O/G, *positions] -> [N, O, *positions]
        split = _matmul(columns, factors.transpose(1, 2)).view(groups, samples, *positions, outputs // groups)
        y = split.permute(1, 0, split.dim() - 1, *range(2, split.dim() - 1))
        if groups == 1:
            y = y.squeeze(1)
        else:  # contiguous first: whether a view can join the groups is hard to say where sizes are unknown
            y = y.contiguous().view(samples, outputs, *positions)
    return laid_out(y, channels_last)


def _products_of_windows(
    image: Image,
    factors: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    positions: Sequence[Any],
) -> Tensor:
    """[N, O, *positions] of [N, C, *S] and ``factors`` [G, O / G, C / G * kernel], on the CPU.

    Windows are the columns, so that a product is laid out as its result: that of a sample, or, where there are so few
    positions that the factors would be read too often, that of all samples side by side.
    """
    (groups, outputs, _), samples, count = factors.shape, image.x.shape[0], math.prod(positions)
    across = groups > 1 or (isinstance(count, int) and count < _MANY_POSITIONS)
    y = image.product(factors, kernel, strides, dilations, across)
    if not across:
        return y.view(samples, outputs, *positions)
    return y.reshape(groups * outputs, samples, *positions).transpose(0, 1)


def _convolve_depthwise(x: Tensor, weight: Tensor, strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """One input channel for each group: products added by ascending kernel position, rounded once."""
    kernel = weight.shape[2:]
    inputs, outputs = x.shape[1], weight.shape[0]
    if outputs != inputs:
        x = x.repeat_interleave(outputs // inputs, 1)
    factors = wide(weight).reshape(outputs, -1, *[1] * len(kernel))
    terms = [wide(tap) * factors[:, k] for k, tap in enumerate(taps_of(x, kernel, strides, dilations))]
    return functools.reduce(torch.add, terms).to(x.dtype)


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """[I, O / groups, *kernel] to [O, I / groups, *kernel] with the kernel turned around."""
    dims = list(range(2, weight.dim()))
    split = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return split.flatten(0, 1).flip(dims)


def _transposed(
    x: Tensor,
    weight: Tensor,
    strides: Sequence[int],
    padding: Sequence[int],
    dilations: Sequence[int],
    output_padding: Sequence[Any],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """The transposed convolution of ``x`` [N, I, *S] with ``weight`` [I, O / groups, *kernel]."""
    dims, kernel = len(strides), weight.shape[2:]
    flipped = _flipped(weight, groups)
    reach = [dilation * (k - 1) for k, dilation in zip(kernel, dilations, strict=True)]
    phases = list(itertools.product(*map(range, strides)))
    if any(d != 1 for d in dilations) or not 1 < len(phases) <= _MOST_PHASES:
        before = [r - p for r, p in zip(reach, padding, strict=True)]
        after = [r - p + extra for r, p, extra in zip(reach, padding, output_padding, strict=True)]
        return _convolve(Image(x, before, after, strides), flipped, [1] * dims, dilations, groups, channels_last)
    given = zip(x.shape[2:], strides, padding, reach, output_padding, strict=True)
    sizes = [(n - 1) * s - 2 * p + r + 1 + extra for n, s, p, r, extra in given]
    counts = [(size + s - 1) // s for size, s in zip(sizes, strides, strict=True)]
    found = [_phase(x, flipped, phase, strides, padding, counts, groups) for phase in phases]
    y = interleaved(torch.stack(found), strides)  # a little longer than the result
    for i, size in enumerate(sizes):
        y = y.narrow(2 + i, 0, size)
    return laid_out(y, channels_last)


def _phase(
    x: Tensor,
    flipped: Tensor,
    phase: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    counts: Sequence[Any],
    groups: int,
) -> Tensor:
    """Every ``strides``-th element of a transposed convolution from ``phase`` on, [N, O, *counts].

    The elements of ``x`` that it is made of meet every ``strides``-th position of the kernel, the others zeros.
    """
    before, after, kernel = [], [], flipped
    for i, (r, s, p, count) in enumerate(zip(phase, strides, padding, counts, strict=True)):
        skipped, first = divmod(r + p, s)  # the position of the kernel, not flipped, that meets an element first
        taps = -(-(flipped.shape[2 + i] - first) // s) if first < flipped.shape[2 + i] else 0
        if taps == 0:
            return x.new_zeros(x.shape[0], flipped.shape[0], *counts)
        last = flipped.shape[2 + i] - 1 - first
        kernel = aten.slice.Tensor(kernel, 2 + i, last - (taps - 1) * s, last + 1, s)
        before.append(taps - 1 - skipped)
        after.append(count + skipped - x.shape[2 + i])
    ones = [1] * len(phase)
    return _convolve(Image(x, before, after, ones), kernel, ones, ones, groups, False)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    if not x.is_floating_point():
        return NotImplemented
    dims = weight.dim() - 2
    stride, padding, dilation = (per_dim(v, dims) for v in (stride, padding, dilation))
    channels_last = is_channels_last(x) or (x.is_cuda and is_channels_last(weight))
    if transposed:
        extra = per_dim(output_padding, dims)
        y = _transposed(x, weight, stride, padding, dilation, extra, groups, channels_last)
    else:
        y = _convolve(Image(x, padding, padding, [1] * dims), weight, stride, dilation, groups, channels_last)
    return y if bias is None else y + bias.reshape(-1, *[1] * dims)


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not x.is_floating_point():
        return NotImplemented
    dims = weight.dim() - 2
    stride, padding, dilation = (per_dim(v, dims) for v in (stride, padding, dilation))
    channels_last = is_channels_last(x) or (x.is_cuda and is_channels_last(weight))
    kernel = weight.shape[2:]
    d_input = d_weight = d_bias = None
    if output_mask[0]:
        if transposed:
            fitted = _fitted(grad, x.shape[2:], padding, kernel, stride, dilation)
            d_input = _convolve(fitted, weight, stride, dilation, groups, channels_last)
        else:
            least = [
                (n - 1) * s - 2 * p + d * (k - 1) + 1
                for n, s, p, d, k in zip(grad.shape[2:], stride, padding, dilation, kernel, strict=True)
            ]
            extra = [size - reached for size, reached in zip(x.shape[2:], least, strict=True)]
            d_input = _transposed(grad, weight, stride, padding, dilation, extra, groups, channels_last)
    if output_mask[1]:
        # Over batch and positions, ascending: [G, A, rows] @ [G, rows, B * kernel].
        small, large = (x, grad) if transposed else (grad, x)
        fitted = _fitted(large, small.shape[2:], padding, kernel, stride, dilation)
        if x.device.type == "cpu":
            summed = small.shape[0] * math.prod(small.shape[2:])
            by_channel = small.transpose(0, 1).reshape(groups, small.shape[1] // groups, summed)
            d_weight = fitted.product_transposed(by_channel, kernel, stride, dilation).reshape(weight.shape)
        else:
            columns = _columns(fitted.written_out(), kernel, stride, dilation, groups)
            d_weight = _matmul(_rows(small, groups).transpose(1, 2), columns).reshape(weight.shape)
    if output_mask[2]:
        d_bias = grad.sum([0, *range(2, grad.dim())])
    return d_input, d_weight, d_bias


def _fitted(
    x: Tensor,
    positions: Sequence[Any],
    padding: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Image:
    """``x`` padded, or cut, to as much as ``positions`` windows along each spatial dim cover."""
    covered = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(positions, stride, dilation, kernel, strict=True)]
    after = [wanted - size - p for wanted, size, p in zip(covered, x.shape[2:], padding, strict=True)]
    return Image(x, padding, after, [1] * len(kernel))


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
