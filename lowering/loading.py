"""Load the kernels that a graph needs; hold the CPU kernels against their references, once for each binary.

A compiler or a processor that does not do what the kernels rely on must not pass silently: before a new library is
used, each family computes a few small cases whose bits its reference knows.  The verdict is kept beside the binary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import native
from .attention import reference as attention
from .matmul import reference as matmul
from .reduction import reference as reduction
from .scan import reference as scan
from .scatter import reference as scatter
from .softmax import reference as softmax

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def load_for(devices: Iterable[torch.device]) -> None:
    """Load what runs on ``devices``.  GPU kernels load themselves when they are first called.

    Raises:
        NativeBuildError: see :func:`load_cpu`.
    """
    if any(device.type == "cpu" for device in devices):
        load_cpu()


@functools.cache
def load_cpu() -> None:
    """Build the CPU kernels if need be, load them, and test them if this binary has not been tested yet.

    Raises:
        NativeBuildError: they cannot be built or loaded, or gave bits that their references do not give.
    """
    library = native.load()
    passed = library.with_suffix(".tested")
    if not passed.exists():
        self_test(library)
        passed.touch()


def self_test(library: Path) -> None:
    """Compare small cases of every family with its reference, bit for bit.

    Raises:
        NativeBuildError: one differs; the message names it.
    """
    with _disable_current_modes(), torch.no_grad():
        wrong = [name for name, ours, theirs in _cases() if not _same(ours(), theirs())]
    if wrong:
        raise native.NativeBuildError(
            f"{library} gives other bits than its references for {', '.join(wrong)}, so this compiler or processor "
            "breaks the kernels' order. Try another compiler through CXX, or BICOMPILE_ISA=scalar, and report it."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def _cases() -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """Name, kernel and reference of each case; lengths cross a block of each order and leave a ragged tail."""
    ours = torch.ops.bicompile
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        scale = torch.exp2(torch.randint(-6, 7, shape, generator=generator, device="cpu").double())
        return (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale).to(dtype)

    def case(name: str, target: Any, known: Callable[..., Any], *args: Any) -> Any:
        def first(result: Any) -> Tensor:
            return result[0] if isinstance(result, tuple) else result

        return f"{name} in {dtype}", lambda: first(target(*args)), lambda: first(known(*args))

    for dtype in _DTYPES:
        a, b, x = draw(3, 197, dtype=dtype), draw(19, 197, dtype=dtype).T, draw(3, 77, dtype=dtype)
        heads = [draw(1, 2, 5, 8, dtype=dtype) for _ in range(3)]
        index = torch.tensor([1, 0, 1], device="cpu")
        yield case("mm", ours.mm.default, matmul.mm, a, b)
        yield case("sum", ours.sum.default, reduction.sum, x, [1], False, dtype)
        yield case("sum over columns", ours.sum.default, reduction.sum, x.T.contiguous(), [0], False, dtype)
        yield case("softmax", ours.softmax.default, softmax.softmax, x, 1, False, dtype)
        yield case("sdpa", ours.sdpa.default, attention.sdpa, *heads, None, True, 0.3)
        yield case("cumsum", ours.cumsum.default, scan.cumsum, x, 1, dtype)
        yield case("index_add", ours.index_add.default, scatter.index_add, x[:2], 0, index, x, 1.0)
