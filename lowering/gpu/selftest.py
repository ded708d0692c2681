"""The row kernels are held against their references once on each device, before their first use."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .admission import Admission
from .launch import INTERPRETED

_LOWERING = Path(__file__).resolve().parent.parent

ADMISSION = Admission(
    "rows",
    [
        _LOWERING / "gpu" / "rows.py",
        _LOWERING / "gpu" / "selftest.py",
        *(_LOWERING / "reduction" / name for name in ("gpu.py", "gpu_statistics.py", "order.py", "schedule.py")),
    ],
)
"""The data flow of a row kernel fixes its order, whatever the schedule, so there is one verdict for all of them."""


_ready: set[int] = set()


def require_rows(device: torch.device) -> None:
    """Test the row kernels on ``device``, unless that is done.

    Raises:
        RuntimeError: they do not give the bits of their references there, so nothing can be promised; or the first
            use is inside a CUDA graph's capture, where they cannot be tested.
    """
    if device.type != "cuda" or INTERPRETED or device.index in _ready:
        return
    _ready.add(device.index)  # the test itself must not ask again
    passed = False
    try:
        with _disable_current_modes():
            passed = ADMISSION.allows(
                "row kernels",
                device.index,
                lambda: (ours() for ours, _ in _cases(device)),
                lambda: (theirs().to(device) for _, theirs in _cases(device)),
            )
    finally:
        if not passed:
            _ready.discard(device.index)
    if not passed:
        verdict = ADMISSION.verdict("row kernels", device.index)
        why = verdict.reason if verdict else "a CUDA graph is being captured; run the function once before that"
        raise RuntimeError(
            f"row kernels: expected the bits of their references on {torch.cuda.get_device_name(device)}, got: {why}. "
            "Run `python -m bicompile doctor`, and report it"
        )


def _cases(device: torch.device) -> Iterator[tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Kernel and reference of each case: every way to walk, few kernels, since each has to be compiled.

    Lengths cross a section and leave a ragged tail.
    """
    from bicompile.lowering.reduction import gpu, gpu_statistics, reference

    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        scale = torch.exp2(torch.randint(-6, 7, shape, generator=generator, device="cpu").double())
        return (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale).to(dtype)

    for name, shape, dim, dtype in (
        ("sum", (2, 20_000), 1, torch.float32),
        ("sum", (9_000, 3), 0, torch.float32),
        ("mean_square", (300, 40), 1, torch.bfloat16),
    ):
        x = draw(shape, dtype)
        known: Any = getattr(reference, name)
        yield (
            functools.partial(gpu.reduce, name, x.to(device), [dim], False, dtype),
            functools.partial(known, x, [dim], False, dtype, reference.gpu_fold),
        )
    x = draw((3, 577), torch.float32)
    yield (
        functools.partial(_first, gpu_statistics.var, x.to(device), [1], 1.0, False, True),
        functools.partial(_first, reference.var, x, [1], 1.0, False, True, reference.gpu_moments),
    )


def _first(op: Callable[..., Any], *arguments: Any) -> Tensor:
    """The first result of an op with several."""
    return op(*arguments)[0]
