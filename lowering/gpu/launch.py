"""Launching Triton kernels with little Python."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .device import device_key
from .driver import driver_launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run under Triton's interpreter, on CPU tensors."""


Describe = Callable[[Tensor], Any]
"""Makes the descriptor by which a kernel reads or writes a tensor through TMA."""


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
        described: which tensors, by their places, the kernel takes by descriptor, and how these are made.
        options: other options of Triton's compiler.
    """

    __slots__ = ("kernel", "grid", "tail", "described", "options", "run")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: Sequence[Any],
        constants: Sequence[Any],
        warps: int,
        stages: int = 1,
        described: Mapping[int, Describe] | None = None,
        **options: Any,
    ) -> None:
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.tail, self.described = (*integers, *constants), described or {}
        # A product must not be fused with its addition, here or there, as the compiler likes.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False, **options}
        self.run: Run | None = None

    def __call__(self, device: int, *tensors: Any) -> None:
        """Launch on the current stream of CUDA device ``device``, which must be the current one."""
        if self.run is None:
            arguments = self.arguments(tensors)
            if INTERPRETED:
                self.kernel[self.grid](*arguments, **self.options)
                return
            self.run = self._compiled(device, arguments, len(tensors))
        self.run(torch._C._cuda_getCurrentRawStream(device), tensors)

    def arguments(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """All that the kernel is given for ``tensors``."""
        return (*[self.described[i](t) if i in self.described else t for i, t in enumerate(tensors)], *self.tail)

    def _compiled(self, device: int, arguments: tuple[Any, ...], count: int) -> Run:
        """Compile the kernel for ``arguments``, of which the first ``count`` are tensors."""
        compiled = self.kernel.warmup(*arguments, grid=self.grid, **self.options)
        function = loaded(compiled, device)
        run = static_launch(compiled, function, self.grid, arguments, count)
        run = run or driver_launch(compiled, function, self.grid, arguments)
        if run is not None:
            return run
        runner = compiled[self.grid]
        return lambda stream, tensors: runner(*self.arguments(tensors), stream=stream)


@functools.cache
def loaded(compiled: Any, device: int) -> int:
    """The function of a kernel that Triton has compiled for ``device``, which is loaded onto it.

    Triton itself would first compile a launcher in C for the kernel, which takes as long as a small kernel.

    Raises:
        OutOfResources: it needs more shared memory than the device has.
    """
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources

    shared, limit = compiled.metadata.shared, device_key(device).shared_memory
    if shared > limit:
        raise OutOfResources(shared, limit, "shared memory")
    _, function, *_ = driver.active.utils.load_binary(compiled.name, compiled.kernel, shared, device)
    return function


Run = Callable[[int, tuple[Any, ...]], None]
"""Launches a kernel on a stream, for tensors that lie like those that it was compiled for."""

_CODES = {"i32": "i", "i64": "l", "fp32": "f"}
"""Numbers as PyTorch's launcher names their types; an address is an ``O``."""


def static_launch(
    compiled: Any, function: int, grid: tuple[int, ...], arguments: Sequence[Any], count: int
) -> Run | None:
    """The launch of a kernel by PyTorch's own launcher of Triton's, which Inductor uses.

    It takes half of the time of Triton's.  None where there is no such launcher, and for kernels that take anything but
    addresses and numbers or ask for something special.

    Args:
        compiled: what Triton has compiled.
        function: of it, on the device.
        grid: programs along the three axes.
        arguments: the kernel's, of which the first ``count`` are tensors.
        count: see there.
    """
    launcher, metadata = getattr(torch._C, "_StaticCudaLauncher", None), compiled.metadata
    types = list(compiled.src.signature.values())
    codes = ["" if t == "constexpr" else "O" if str(t).startswith("*") else _CODES.get(t, "?") for t in types]
    scratch = [getattr(metadata, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    special = (metadata.launch_pdl, metadata.launch_cooperative_grid, metadata.num_ctas > 1, *scratch)
    if launcher is None or "?" in codes or any(special):
        return None
    launch = launcher._launch_kernel
    numbers = [value for code, value in zip(codes[count:], arguments[count:], strict=True) if code]
    unused = [None for size in scratch if size is not None]  # scratch memory of no bytes
    head = (function, *grid, metadata.num_warps, metadata.shared, "".join(codes) + "O" * len(unused))
    rest = (*numbers, *unused)

    def run(stream: int, tensors: tuple[Any, ...]) -> None:
        launch(*head, (*[t.data_ptr() for t in tensors if t is not None], *rest), stream)

    return run
