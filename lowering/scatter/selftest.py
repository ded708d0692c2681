"""The scatter kernels are held against their reference once on each device, before their first use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bicompile.lowering.gpu.selftest import Case, SelfTest, spread

from .schedule import ElementSchedule

_WALKS = (ElementSchedule("columns", block=32, ahead=4), ElementSchedule("sorted", block=128, ahead=8))


def _cases(device: torch.device) -> Iterator[Case]:
    """Both walks over rows, along segments of 1 to 300 contributions, and both over elements."""
    from . import gpu, reference

    generator = torch.Generator().manual_seed(0)
    at = torch.cat([torch.full((count,), place, device="cpu") for place, count in enumerate((1, 2, 9, 63, 64, 300))])
    at = at[torch.randperm(len(at), generator=generator, device="cpu")]
    for dtype in (torch.float32, torch.bfloat16):
        self, source = spread((7, 70), dtype, generator), spread((len(at), 70), dtype, generator)
        yield (
            functools.partial(gpu.index_add, self.to(device), 0, at.to(device), source.to(device), 1.0),
            functools.partial(reference.index_add, self, 0, at, source),
        )
    total, values = spread((7, 5), torch.float32, generator), spread((61, 5), torch.float32, generator)
    index = torch.randint(0, 7, values.shape, generator=generator, device="cpu")
    for walk in _WALKS:
        yield (
            functools.partial(_walked, total.to(device), index.to(device), values.to(device), walk),
            functools.partial(reference.scatter_add, total, 0, index, values),
        )


def _walked(total: Tensor, index: Tensor, values: Tensor, schedule: ElementSchedule) -> Tensor:
    from . import gpu

    out = total.clone()
    keys = index * out.shape[1] + torch.arange(out.shape[1], device=out.device)
    gpu.walk_elements(out.view(-1), keys.view(-1), values, "add", schedule)
    return out


_HERE = Path(__file__).resolve().parent
_SOURCES = ("selftest.py", "gpu.py", "gpu_kernels.py", "schedule.py")
SCATTERS = SelfTest("scatter", [_HERE / name for name in _SOURCES], _cases)
require_scatters = SCATTERS.require
