"""Images with zeros between and around their elements, and the windows that move over them.

Views, copies and layouts: nothing is computed here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowering.windows.op import DTYPES

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)
MOST_TAPS = 16
"""Windows of more elements are summed by a kernel of their own instead of one addition for each."""


class Image(NamedTuple):
    """A tensor [N, C, *S] with ``between - 1`` zeros between its elements along each trailing dim, and zeros around.

    A negative count of zeros before or after takes elements away.
    """

    x: Tensor
    before: Sequence[Any]
    after: Sequence[Any]
    between: Sequence[int]

    @property
    def sizes(self) -> list[Any]:
        """Of the trailing dims, zeros included."""
        given = zip(self.x.shape[2:], self.between, self.before, self.after, strict=True)
        return [(n - 1) * s + 1 + b + a for n, s, b, a in given]

    @property
    def has_zeros(self) -> bool:
        """Whether it is more than its tensor, as far as that is known."""
        known = all(isinstance(n, int) and n == 0 for n in (*self.before, *self.after))
        return not known or any(n != 1 for n in self.between)

    @property
    def has_kernel(self) -> bool:
        """Whether ``bicompile::windows`` takes it, which wants numbers that are known."""
        known = all(isinstance(n, int) for n in (*self.before, *self.after))
        return known and self.x.device.type == "cpu" and self.x.dtype in DTYPES

    def written_out(self) -> Tensor:
        """As a tensor of its own."""
        if not self.has_zeros:
            return self.x
        if self.has_kernel:  # Inductor would look for zeros wherever it reads an element
            ones = [1] * len(self.between)
            x, numbers = self._numbers(ones, ones, ones)
            return torch.ops.bicompile.windows(x, *numbers, False).view(*x.shape[:2], *self.sizes)
        return padded(stuffed(self.x, self.between), self.before, self.after)

    def product(
        self, factors: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], across: bool
    ) -> Tensor:
        """``factors`` times the windows as ``bicompile::mm_windows`` has it, on the CPU."""
        if not (across or self.has_zeros) and all(n == 1 for n in (*kernel, *strides)):
            x = self.x.contiguous().flatten(2)
            return torch.bmm(factors.expand(x.shape[0], *factors.shape[1:]), x)
        x, numbers = self._numbers(kernel, strides, dilations)
        return torch.ops.bicompile.mm_windows(factors.contiguous(), x, *numbers, across)

    def product_transposed(
        self, factors: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
    ) -> Tensor:
        """``factors`` times the windows by position as ``bicompile::mm_windows_transposed`` has it, on the CPU."""
        x, numbers = self._numbers(kernel, strides, dilations)
        return torch.ops.bicompile.mm_windows_transposed(factors.contiguous(), x, *numbers)

    def _numbers(
        self, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
    ) -> tuple[Tensor, list[list[int]]]:
        """The tensor and the numbers that the kernels for windows take."""
        x, before, after, between = self
        if not self.has_kernel:
            none, ones = [0] * len(kernel), [1] * len(kernel)
            x, before, after, between = self.written_out(), none, none, ones
        return x.contiguous(), [list(each) for each in (kernel, strides, dilations, before, after, between)]


def padded(x: Tensor, before: Sequence[Any], after: Sequence[Any]) -> Tensor:
    """Zeros around the trailing dims; a negative count takes elements away."""
    pads = [count for pair in reversed(list(zip(before, after, strict=True))) for count in pair]
    return x if all(isinstance(n, int) and n == 0 for n in pads) else aten.constant_pad_nd(x, pads, 0.0)


def stuffed(x: Tensor, strides: Sequence[int]) -> Tensor:
    """``stride - 1`` zeros between neighbours along each trailing dim."""
    for dim, stride in enumerate(strides, x.dim() - len(strides)):
        if stride > 1:
            apart = F.pad(x.unsqueeze(dim + 1), [0, 0] * (x.dim() - dim - 1) + [0, stride - 1])
            x = apart.flatten(dim, dim + 1).narrow(dim, 0, (x.shape[dim] - 1) * stride + 1)
    return x


def interleaved(phases: Tensor, strides: Sequence[int]) -> Tensor:
    """[N, C, *S * strides] of phases [P, N, C, *S]; see ``bicompile::interleaved``."""
    if phases.device.type == "cpu" and phases.dtype in DTYPES:  # Inductor thinks long about such indices
        return torch.ops.bicompile.interleaved(phases.contiguous(), list(strides))
    dims, lead = len(strides), phases.shape[1:3]
    split = phases.view(*strides, *phases.shape[1:])
    order = [dims, dims + 1, *(d for i in range(dims) for d in (dims + 2 + i, i))]
    sizes = [count * stride for count, stride in zip(phases.shape[3:], strides, strict=True)]
    return split.permute(order).reshape(*lead, *sizes)


def windows_of(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Tensor:
    """Every window of the trailing dims, as a view [..., *positions, *kernel]."""
    first = x.dim() - len(kernel)
    for dim, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), first):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)
        if dilation > 1:
            x = x[..., ::dilation]
    return x


def taps_of(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[Tensor]:
    """The windows' elements by kernel position, ascending: a view [..., *positions] for each."""
    first = x.dim() - len(kernel)
    spans = [
        (x.shape[first + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] * strides[i] + 1
        for i in range(len(kernel))
    ]
    taps = []
    for position in itertools.product(*map(range, kernel)):
        tap = x
        for i, k in enumerate(position):
            tap = tap.narrow(first + i, k * dilations[i], spans[i])
            tap = aten.slice.Tensor(tap, first + i, 0, None, strides[i]) if strides[i] > 1 else tap
        taps.append(tap)
    return taps


def per_dim(value: Sequence[Any], dims: int) -> list[Any]:
    """One value for each spatial dim, of one for each or one for all."""
    return list(value) * (dims if len(value) == 1 else 1)


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype that its elements are added in."""
    return x.float() if x.dtype in _HALVES else x


def laid_out(y: Tensor, channels_last: bool) -> Tensor:
    """``y`` of 3 to 5 dims in its own memory, the channels last or not."""
    if channels_last:
        return y.contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.channels_last_3d)
    return y.contiguous()


def is_channels_last(x: Tensor) -> bool:
    """Is ``x`` an image, or a volume, whose channels lie innermost in memory?"""
    if x.dim() == 4:
        return torch._prims_common.suggest_memory_format(x) == torch.channels_last
    return x.dim() == 5 and torch._prims_common.suggest_memory_format(x) == torch.channels_last_3d
