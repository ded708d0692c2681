"""Kernels whose data flow fixes their order are held against references once on each device, before their first use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .admission import Admission
from .launch import INTERPRETED

_LOWERING = Path(__file__).resolve().parent.parent

Case = tuple[Callable[[], Tensor], Callable[[], Tensor]]
"""What a kernel gives, and what its reference gives, on any device."""


class SelfTest:
    """The test of a family of kernels: one verdict for all of them, whatever the schedule.

    Args:
        family: its name.
        sources: the files whose change makes the verdict void.
        cases: the cases for a device, few, since each kernel has to be compiled.
    """

    def __init__(self, family: str, sources: Sequence[Path], cases: Callable[[torch.device], Iterable[Case]]) -> None:
        self.admission = Admission(family, [Path(__file__), *sources])
        self._name = f"{family} kernels"
        self.cases = cases
        self._ready: set[int] = set()
        self._testing = False

    def require(self, device: torch.device) -> None:
        """Test the kernels on ``device``, unless that is done.

        Raises:
            RuntimeError: they do not give the bits of their references there, so nothing can be promised; or the first
                use is inside a CUDA graph's capture, where they cannot be tested.
        """
        if device.type != "cuda" or INTERPRETED or device.index in self._ready:
            return
        with self.admission.lock:
            if self._testing:  # in this thread: the test itself uses the kernels
                return
            self._testing = True
            try:
                with _disable_current_modes():
                    passed = self.admission.allows(
                        self._name,
                        device.index,
                        lambda: (ours() for ours, _ in self.cases(device)),
                        lambda: (theirs().to(device) for _, theirs in self.cases(device)),
                    )
            finally:
                self._testing = False
        if not passed:
            verdict = self.admission.verdict(self._name, device.index)
            why = verdict.reason if verdict else "a CUDA graph is being captured; run the function once before that"
            raise RuntimeError(
                f"{self._name}: expected the bits of their references on {torch.cuda.get_device_name(device)}, got: "
                f"{why}. Run `python -m bicompile doctor`, and report it"
            )
        self._ready.add(device.index)


def spread(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values over 13 binades, on the CPU."""
    scale = torch.exp2(torch.randint(-6, 7, shape, generator=generator, device="cpu").double())
    return (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale).to(dtype)


def _cases(device: torch.device) -> Iterator[Case]:
    """Every way to walk.  Lengths cross a section and leave a ragged tail."""
    from bicompile.lowering.reduction import gpu, gpu_statistics, reference

    generator = torch.Generator().manual_seed(0)
    for name, shape, dim, dtype in (
        ("sum", (2, 20_000), 1, torch.float32),
        ("sum", (9_000, 3), 0, torch.float32),
        ("mean_square", (300, 40), 1, torch.bfloat16),
    ):
        x = spread(shape, dtype, generator)
        known: Any = getattr(reference, name)
        yield (
            functools.partial(gpu.reduce, name, x.to(device), [dim], False, dtype),
            functools.partial(known, x, [dim], False, dtype, reference.gpu_fold),
        )
    x = spread((3, 577), torch.float32, generator)
    yield (
        functools.partial(_first, gpu_statistics.var, x.to(device), [1], 1.0, False, True),
        functools.partial(_first, reference.var, x, [1], 1.0, False, True, reference.gpu_moments),
    )


def _first(op: Callable[..., Any], *arguments: Any) -> Tensor:
    """The first result of an op with several."""
    return op(*arguments)[0]


_REDUCTION = ("gpu.py", "gpu_statistics.py", "order.py", "schedule.py")
_ROWS = SelfTest(
    "row", [_LOWERING / "gpu" / "rows.py", *(_LOWERING / "reduction" / name for name in _REDUCTION)], _cases
)
require_rows = _ROWS.require
