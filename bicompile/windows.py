"""Convolution and pooling as views, products and sums that the passes know: normal forms of ops over windows.

A convolution is a matrix product of the windows of all samples with the kernels of the output channels; what is summed
is (channel, kernel position), ascending.  So it has the order of ``lowering.matmul``, which the batch cannot reach.  On
a GPU Inductor writes out the windows, as rows; on a CPU ``lowering.windows`` does, as columns.  A transposed
convolution, and the gradient of a convolution's input, is for each of its phases (the remainders by the stride) the
convolution of the input with those positions of the flipped kernel that meet an element; of many phases, or with a
dilation, that of the stuffed input (zeros between its elements) with the whole kernel.  It too rounds once.  The
gradient of a weight sums over batch and positions, in ascending order.  A depthwise kernel is small: its products are
added position by position, in float32, which fuses.

A pooled mean adds its window in ascending order in float32, divides and rounds once.  Its gradient does the same over
the windows that an element belongs to.
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

from .images import Image, interleaved, padded, stuffed, taps_of, windows_of
from .lowering.windows.op import positions_of

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)
# Windows of more elements are summed by a kernel of their own instead of one addition for each.
_MOST_TAPS = 16
# From so many positions on, a sample's product is large enough by itself (CPU).
_MANY_POSITIONS = 128
# A transposed convolution of a larger stride multiplies the zeros between its input's elements.
_MOST_PHASES = 16


# -- Convolution ------------------------------------------------------------------------------------------------------


def _per_dim(value: Sequence[Any], dims: int) -> list[Any]:
    """One value for each spatial dim, of one for each or one for all."""
    return list(value) * (dims if len(value) == 1 else 1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in _HALVES else x


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
    if weight.shape[1] == 1 and groups > 1 and math.prod(kernel) <= _MOST_TAPS:
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
    return _laid_out(y, channels_last)


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
    factors = _wide(weight).reshape(outputs, -1, *[1] * len(kernel))
    terms = [_wide(tap) * factors[:, k] for k, tap in enumerate(taps_of(x, kernel, strides, dilations))]
    return functools.reduce(torch.add, terms).to(x.dtype)


def _laid_out(y: Tensor, channels_last: bool) -> Tensor:
    """``y`` of 3 to 5 dims in its own memory, the channels last or not."""
    if channels_last:
        return y.contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.channels_last_3d)
    return y.contiguous()


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """[I, O / groups, *kernel] to [O, I / groups, *kernel] with the kernel turned around."""
    dims = list(range(2, weight.dim()))
    split = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return split.flatten(0, 1).flip(dims)


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return torch._prims_common.suggest_memory_format(x) == torch.channels_last
    return x.dim() == 5 and torch._prims_common.suggest_memory_format(x) == torch.channels_last_3d


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
    return _laid_out(y, channels_last)


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
    stride, padding, dilation = (_per_dim(v, dims) for v in (stride, padding, dilation))
    channels_last = _is_channels_last(x) or (x.is_cuda and _is_channels_last(weight))
    if transposed:
        extra = _per_dim(output_padding, dims)
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
    stride, padding, dilation = (_per_dim(v, dims) for v in (stride, padding, dilation))
    channels_last = _is_channels_last(x) or (x.is_cuda and _is_channels_last(weight))
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


# -- Pooling ----------------------------------------------------------------------------------------------------------


def _window_sums(x: Tensor, kernel: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The sum of each window of the trailing dims of ``x``, which is float32 or float64."""
    ones = [1] * len(kernel)
    if math.prod(kernel) <= _MOST_TAPS:
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
        kernel = _per_dim(kernel_size, dims)
        strides, pads = _per_dim(stride or kernel, dims), _per_dim(padding, dims)
        sizes = x.shape[-dims:]
        outputs = _pool_outputs(sizes, kernel, strides, pads, ceil_mode)
        reach = _reaching(kernel, sizes, pads)
        after = [(o - 1) * s + k - n - p for o, s, k, n, p in zip(outputs, strides, reach, sizes, pads, strict=True)]
        sums = _window_sums(padded(_wide(x), pads, after), reach, strides)
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
        kernel = _per_dim(kernel_size, dims)
        strides, pads = _per_dim(stride or kernel, dims), _per_dim(padding, dims)
        sizes, outputs = x.shape[-dims:], grad.shape[-dims:]
        divisor = _divisors(x, sizes, outputs, kernel, strides, pads, count_include_pad, divisor_override)
        shares = stuffed(_wide(grad) / divisor, strides)
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
    return functools.reduce(torch.add, flat.unbind(-1)) if taps <= _MOST_TAPS else flat.sum(-1)


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
    sums = _adaptive_sums(_wide(x), sizes, outputs)
    return _like(x, (sums / _adaptive_counts(x, sizes, outputs)).to(x.dtype))


def _adaptive_mean_pool_backward(dims: int) -> Callable[[Tensor, Tensor], Tensor]:
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        sizes, outputs = [int(n) for n in x.shape[-dims:]], [int(n) for n in grad.shape[-dims:]]
        if grad.numel() == 0:
            return torch.zeros_like(x)
        shares = _wide(grad) / _adaptive_counts(x, sizes, outputs)
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
        total = _wide(grad)
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
    return _laid_out(result, _is_channels_last(x))


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
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
