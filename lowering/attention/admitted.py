"""Which schedule a call takes: the first of those that suit it which gave the reference's bits on this device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bicompile.lowering.gpu.admission import Admission

from .problem import Problem, mask_strides, problem_of

_HERE = Path(__file__).parent
ADMISSION = Admission(
    "attention",
    [
        _HERE / name
        for name in (
            "kernels.py",
            "split_kernels.py",
            "rows_kernel.py",
            "hopper.py",
            "backward_kernels.py",
            "order.py",
            "problem.py",
            "gpu.py",
            "gpu_backward.py",
        )
    ],  # fmt: skip
)

Schedule = TypeVar("Schedule")
_CHOSEN: dict[Any, Any] = {}


def choose(
    p: Problem,
    candidates: Sequence[Schedule],
    reference: Any,
    run: Callable[[Problem, Any], tuple[Tensor, ...]],
) -> Schedule:
    """The first of ``candidates`` that is admitted for problems like ``p``, or ``reference``, which always is.

    ``run`` gives all results of one probe under a schedule.
    """
    device = p.q.device.index
    loose = any(stride % 16 for stride in mask_strides(p.mask)[:3])  # by which a kernel is compiled anew
    identity = (p.q.dtype, p.q.shape[3], p.v.shape[3], f"{'loose ' * loose}{p.kind}", p.causal, p.drops)
    key = (device, identity, tuple(candidates), reference)
    if (found := _CHOSEN.get(key)) is not None:
        return found

    def results(schedule: Any) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(run(probe, schedule) for probe in probes_of(p.q.device, *identity))

    for schedule in candidates:
        named = f"{schedule} for {', '.join(str(part) for part in identity)}"
        if schedule == reference or ADMISSION.allows(
            named,
            device,
            functools.partial(results, schedule),
            functools.partial(results, reference),
        ):
            break
    else:
        schedule = reference
    if not torch.cuda.is_current_stream_capturing():  # while capturing, nothing new can be admitted
        _CHOSEN[key] = schedule
    return schedule


def probes_of(
    device: torch.device, dtype: torch.dtype, depth: int, value_depth: int, kind: str, causal: bool, drops: bool
) -> Iterator[Problem]:
    """Values over many binades, ragged lengths over splits of every size, several anchors.

    Some queries give nearly all weight to one key, others nearly the same to all.  Twins among the keys have the same
    weight, and half of their values cancel: what is left there is the rounding, which the order shows in.
    """
    sizes = [(2, 4, 2, 77, 1337)]  # batch, heads, kv heads, queries, keys
    if dtype.itemsize == 2:
        sizes += [(1, 4, 1, 1201, 1201), (1, 2, 1, 131, 5377)]
    for number, (batch, heads, kv_heads, queries, keys) in enumerate(sizes):
        g = torch.Generator(device).manual_seed(number)
        q, k, v = (
            _values((batch, n, h, d), dtype, device, g).transpose(1, 2)
            for n, h, d in ((queries, heads, depth), (keys, kv_heads, depth), (keys, kv_heads, value_depth))
        )
        q.mul_(torch.exp2(-8.0 * torch.rand((batch, 1, queries, 1), generator=g, device=device)))
        twin, half = twins(keys, device), value_depth // 2
        k[:, :, twin] = k[:, :, twin - TWIN]
        v[:, :, twin, :half] = -v[:, :, twin - TWIN, :half]
        twin = twins(queries, device)
        q[:, :, twin] = q[:, :, twin - TWIN]
        mask = None if kind == "none" else _mask(batch, queries, keys, kind, dtype, device, g)
        seeds = None
        if drops:
            seeds = torch.randint(0, 2**62, (batch, heads, queries), generator=g, device=device)
        dropout_p = 0.1 if drops else 0.0  # most twins stay together
        yield problem_of("sdpa", q, k, v, mask, causal, 0.5 * depth**-0.5, None, seeds, dropout_p)


TWIN = 40
"""How far apart twins are: in one block, and in different groups of the tensor core."""


def twins(length: int, device: torch.device) -> Tensor:
    """Of ``length`` rows, those that are made like the one TWIN before them."""
    at = torch.arange(length, device=device)
    return at[at % (2 * TWIN) >= TWIN]


def _values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g, device=device)
    x = x * torch.exp(1.5 * torch.randn(shape, generator=g, device=device))
    x[:, 1::2] = torch.where(
        torch.rand(shape, generator=g, device=device)[:, 1::2] < 0.3, -x[:, : shape[1] // 2 * 2 : 2], x[:, 1::2]
    )
    return x.to(dtype)


def _mask(
    batch: int, queries: int, keys: int, kind: str, dtype: torch.dtype, device: torch.device, g: torch.Generator
) -> Tensor:
    """Causal to the lower right, left padding, a document that starts elsewhere, gaps, and rows that see nothing.

    Its rows begin at multiples of 16 elements, if ``kind`` does not say that they are loose.
    """
    wide = keys if kind.startswith("loose ") else -(-keys // 16) * 16
    seen = torch.ones((batch, 1, queries, wide), dtype=torch.bool, device=device).tril(max(keys - queries, 0))
    seen[0, :, :, :41] = False
    seen[:, :, queries // 2 :, :203] = False
    seen[:, :, 3] = False
    seen[-1] &= torch.rand((queries, wide), generator=g, device=device) < 0.9
    if kind.endswith("bool"):
        return seen[..., :keys]
    bias = torch.randn((batch, 1, queries, wide), generator=g, device=device).to(dtype)
    return bias.masked_fill(~seen, float("-inf"))[..., :keys]
