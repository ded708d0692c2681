"""The scan kernels are held against their reference once on each device, before their first use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from bicompile.lowering.gpu.selftest import Case, SelfTest, spread


def _cases(device: torch.device) -> Iterator[Case]:
    """Dense rows and columns of several segments, the last one ragged."""
    from . import gpu, reference

    generator = torch.Generator().manual_seed(0)
    for shape, dim, dtype in (((5, 1500), 1, torch.float32), ((1500, 5), 0, torch.bfloat16)):
        x = spread(shape, dtype, generator)
        yield (
            functools.partial(gpu.cumsum, x.to(device), dim, dtype),
            functools.partial(reference.gpu_cumsum, x, dim, dtype),
        )


_HERE = Path(__file__).resolve().parent
_SOURCES = [_HERE / "selftest.py", _HERE.parent / "gpu" / "rows.py"]
_SOURCES += [_HERE / name for name in ("gpu.py", "order.py", "schedule.py")]
SCANS = SelfTest("scan", _SOURCES, _cases)
require_scans = SCANS.require
