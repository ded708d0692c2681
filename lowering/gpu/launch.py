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

    __slots__ = ("kernel", "grid", "tail", "options", "again")

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
        self.again: Callable[[int, tuple[Any, ...]], None] | None = None

    def __call__(self, device: int, *tensors: Any) -> None:
        """Launch on the current stream of CUDA device ``device``, which must be the current one."""
        if self.again is not None:
            self.again(torch._C._cuda_getCurrentRawStream(device), tensors)
            return
        compiled = self.kernel[self.grid](*tensors, *self.tail, **self.options)
        if not INTERPRETED:
            self.again = relaunch(compiled, self.grid, tensors, self.tail)


_CODES = {"i32": "i", "i64": "l", "fp32": "f"}
"""Numbers as PyTorch's launcher names their types; an address is an ``O``."""


def relaunch(
    compiled: Any, grid: tuple[int, ...], tensors: tuple[Any, ...], tail: tuple[Any, ...]
) -> Callable[[int, tuple[Any, ...]], None]:
    """What launches a compiled kernel on a stream and other tensors.

    It is PyTorch's own launcher of Triton's kernels, which Inductor uses and which takes half of the time of Triton's,
    for kernels that take addresses and numbers and ask for nothing special; Triton's for all others.
    """
    launcher, metadata = getattr(torch._C, "_StaticCudaLauncher", None), compiled.metadata
    types = list(compiled.src.signature.values())
    codes = ["" if t == "constexpr" else "O" if str(t).startswith("*") else _CODES.get(t, "?") for t in types]
    scratch = [getattr(metadata, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    special = (metadata.launch_pdl, metadata.launch_cooperative_grid, metadata.num_ctas > 1, *scratch)
    if launcher is None or "?" in codes or any(special):
        runner = compiled[grid]
        return lambda stream, tensors: runner(*tensors, *tail, stream=stream)
    launch, count = launcher._launch_kernel, len(tensors)
    numbers = [value for code, value in zip(codes[count:], tail, strict=True) if code]
    unused = [None for size in scratch if size is not None]  # scratch memory of no bytes
    head = (compiled.function, *grid, metadata.num_warps, metadata.shared, "".join(codes) + "O" * len(unused))
    rest = (*numbers, *unused)

    def run(stream: int, tensors: tuple[Any, ...]) -> None:
        launch(*head, (*[t.data_ptr() for t in tensors if t is not None], *rest), stream)

    return run


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


_CHECKED: set[Any] = set()


def checked(check: Callable[..., None], *args: Any) -> None:
    """Call ``check(*args)``, once for tensors of the same shapes and dtypes: it takes longer than a launch."""
    key = (check, *[(a.shape, a.dtype) if isinstance(a, Tensor) else a for a in args])
    if key not in _CHECKED:
        check(*args)
        if len(_CHECKED) >= _MAX_PLANS:
            _CHECKED.clear()
        _CHECKED.add(key)


def new_dense(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A new contiguous tensor of ``shape``, of the dtype and on the device of ``like``, which is the current one.

    On a GPU it is made as Inductor's graphs make theirs, in a third of the time of ``new_empty``.
    """
    if not like.is_cuda:
        return like.new_empty(shape)
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size or 1
    empty: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
    return empty(tuple(shape), tuple(strides[::-1]), like.dtype)


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
