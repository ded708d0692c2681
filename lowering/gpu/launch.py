"""Launching Triton kernels with little Python: plans kept by shape, strides and alignment."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run under Triton's interpreter, on CPU tensors."""


class Launch:
    """A kernel with its constants, compiled at the first call and launched with little Python from then on.

    Triton specialises a binary on the divisibility of integers and addresses by 16.  A ``Launch`` must therefore be
    called with integers that do not change, and with tensors whose addresses stay divisible or not.

    Args:
        kernel: a function under ``triton.jit``.
        grid: programs along each axis.
        integers: the arguments that follow the tensors.
        constants: the ``constexpr`` arguments that follow those.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        options: other options of Triton's compiler.
    """

    __slots__ = ("kernel", "grid", "tail", "options", "runner")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: Sequence[Any],
        constants: Sequence[Any],
        warps: int,
        stages: int = 1,
        **options: Any,
    ) -> None:
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.tail = (*integers, *constants)
        # A product must not be fused with its addition, here or there, as the compiler likes.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False, **options}
        self.runner: Any = None

    def __call__(self, device: int, *tensors: Any) -> None:
        """Launch on the current stream of CUDA device ``device``, which must be the current one."""
        if self.runner is not None:
            self.runner(*tensors, *self.tail, stream=torch._C._cuda_getCurrentRawStream(device))
            return
        compiled = self.kernel[self.grid](*tensors, *self.tail, **self.options)
        if not INTERPRETED:
            self.runner = compiled[self.grid]


Plan = Callable[..., Any]
_PLANS: dict[Any, Plan] = {}
_MAX_PLANS = 8192


def planned(key: Any, build: Callable[[], Plan]) -> Plan:
    """The plan under ``key``, built where there is none yet.  Forgets all where there are too many.

    One built while a CUDA graph is captured is not kept: nothing could be probed for it.
    """
    plan = _PLANS.get(key)
    if plan is None:
        plan = build()
        if not is_capturing():
            if len(_PLANS) >= _MAX_PLANS:
                _PLANS.clear()
            _PLANS[key] = plan
    return plan


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def key_of(x: Tensor) -> tuple[Any, ...]:
    """All that a plan may depend on in a tensor."""
    return x.shape, x.stride(), x.dtype, x.device.index, x.data_ptr() % 16 == 0


def on_device(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``fn`` with the device of its first tensor as the current one: Triton launches on that."""

    @functools.wraps(fn)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not x.is_cuda or x.device.index == torch._C._cuda_getDevice():
            return fn(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return fn(x, *args, **kwargs)

    return run
