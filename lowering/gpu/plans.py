"""Ops on a GPU are planned once for all calls that look alike: what is checked, chosen and counted then is kept."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_PLANS: dict[Any, Callable[..., Any]] = {}
_MAX_PLANS = 8192


class Planned(Generic[Result]):
    """A function of tensors on a GPU, from ``build``, which plans it.

    ``build(*args)`` checks its arguments, of which the first is a tensor, and returns a plan, to be called with the
    same arguments.  It looks at no element, because these may not be there yet.  The plan is kept, and is all that runs
    when tensors with the same shapes, strides, dtypes, device and alignment to 16 bytes come again, and other arguments
    that are equal.  Both run with the tensors' device as the current one: Triton launches on that.

    A plan that is built while a CUDA graph is captured is not kept: nothing could be probed for it.

    Args:
        build: makes a plan.
        setting: of the same arguments, what else the plan depends on, such as a setting of PyTorch's.
    """

    __name__: str

    def __init__(
        self, build: Callable[..., Callable[..., Result]], setting: Callable[..., Hashable] | None = None
    ) -> None:
        self.build, self.setting = build, setting
        functools.update_wrapper(self, build)

    def __call__(self, *args: Any) -> Result:
        device = args[0].get_device()
        if device >= 0 and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self.plan(*args)(*args)
        return self.plan(*args)(*args)

    def plan(self, *args: Any) -> Callable[..., Result]:
        """The plan for ``args``, whose device must be the current one.

        Raises:
            ValueError: the tensors are not all on one device.
        """
        key = (
            self.build,
            self.setting and self.setting(*args),
            *[
                (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x
                for x in args
            ],
        )
        plan: Callable[..., Result] | None = _PLANS.get(key)
        if plan is None:
            devices = sorted({str(x.device) for x in args if isinstance(x, Tensor)})
            if len(devices) > 1:
                name = self.__name__.strip("_")
                raise ValueError(f"{name}: expected tensors on one device, got some on {' and '.join(devices)}")
            plan = self.build(*args)
            if not is_capturing():
                if len(_PLANS) >= _MAX_PLANS:
                    _PLANS.clear()
                _PLANS[key] = plan
        return plan


class Late(Generic[Result]):
    """A function that is imported at its first call."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    @functools.cached_property
    def function(self) -> Callable[..., Result]:
        """The function itself."""
        return getattr(importlib.import_module(self.module), self.name)

    def __call__(self, *args: Any) -> Result:
        return self.function(*args)


ON_GPU: dict[str, Late[Any]] = {}
"""What computes an op of ours on a GPU, by its name."""


def on_gpu(library: torch.library.Library, module: str, *ops: str) -> None:
    """Let the functions of ``module`` that are named like ``ops`` compute these on a GPU.

    It is imported at the first call, because importing an op must not import Triton.
    """
    for op in ops:
        ON_GPU[op] = Late(module, op)
        library.impl(op, ON_GPU[op], "CUDA")


def new_dense(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, order: Sequence[int] | None = None
) -> Callable[[], Tensor]:
    """What makes new dense tensors of ``shape`` on the device of ``like``, which must be the current one then.

    They have the dtype of ``like`` if no other is given, and their dims lie in memory in ``order``, the outermost
    first, or else as they come.  On a GPU they are made as Inductor's graphs make theirs, in a third of the time of
    ``torch.empty``.
    """
    shape, strides, step = tuple(shape), [1] * len(shape), 1
    for dim in reversed(range(len(shape)) if order is None else order):
        strides[dim] = step
        step *= shape[dim] or 1
    dtype = like.dtype if dtype is None else dtype
    if not like.is_cuda:
        return functools.partial(torch.empty_strided, shape, tuple(strides), dtype=dtype, device=like.device)
    empty: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
    return functools.partial(empty, shape, tuple(strides), dtype)


class Site:
    """A call in compiled code of an op on a GPU, whose arguments look alike every time but for their addresses.

    So its plan is found once, and then only the addresses are looked at.  A tensor that is not aligned to 16 bytes
    takes the way of all other calls.

    Args:
        op: its name, without ``bicompile::``.
    """

    __slots__ = ("function", "found")

    def __init__(self, op: str) -> None:
        self.function: Late[Any] = ON_GPU[op]
        # Which arguments are tensors, and the plan: together, as another thread may be reading them.
        self.found: tuple[tuple[int, ...], Callable[..., Any]] = (), self._first

    def __call__(self, *args: Any) -> Any:
        tensors, plan = self.found
        addresses = 0
        for place in tensors:
            addresses |= args[place].data_ptr()
        return self.function(*args) if addresses % 16 else plan(*args)

    def _first(self, *args: Any) -> Any:
        """Run by the plan for ``args``, and keep it if it serves the calls to come."""
        function = self.function.function
        if not isinstance(function, Planned):
            self.found = (), function
            return function(*args)
        plan, tensors = function.plan(*args), tuple(i for i, x in enumerate(args) if isinstance(x, Tensor))
        if not is_capturing() and all(args[i].data_ptr() % 16 == 0 for i in tensors):
            self.found = tensors, plan
        return plan(*args)


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def on_device(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``fn`` with the device of its first tensor as the current one: Triton launches on that."""

    @functools.wraps(fn)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not x.is_cuda or x.device.index == torch._C._cuda_getDevice():
            return fn(x, *args, **kwargs)
        with torch.cuda.device(x.device):
            return fn(x, *args, **kwargs)

    return run
