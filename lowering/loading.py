"""Load the CPU kernels that a graph or a call needs, and hold them against their references, once for each binary.

A library of kernels is compiled when the first graph that uses them is, or else at the first call: an op has a stub
until its kernel is registered in front of it.  GPU kernels load themselves; ``gpu.early`` makes them do it in time.

A compiler or a processor that does not do what the kernels rely on must not pass silently: before a new library is
used, it computes a few small cases whose bits a reference knows.  The verdict is kept beside the binary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from . import native
from .attention import reference as attention
from .matmul import reference as matmul
from .norm import reference as norm
from .reduction import reference as reduction
from .scan import reference as scan
from .scatter import reference as scatter
from .softmax import reference as softmax
from .windows import reference as windows

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Kernel, stride, dilation, zeros before, after and between: twice for the two dims of an image; samples across.
_WINDOWS = ([3, 2], [1, 1], [2, 1], [1, 2], [0, 1], [1, 2], True)


# The ops of each library of C++ kernels, as its source registers them.
KERNELS = {
    "attention": ("sdpa",),
    "attention_backward": ("sdpa_backward",),
    "elementwise": ("unary", "binary"),
    "matmul": ("mm", "mm_continued", "mm_windows", "mm_windows_transposed", "bmm", "addmm", "baddbmm"),
    "norm": tuple(
        f"{kind}_norm{part}" for kind in ("layer", "group") for part in ("", "_backward", "_backward_params")
    ),
    "reduction": ("sum", "mean", "sum_square", "mean_square"),
    "reduction_others": ("prod", "amax", "amin", "var", "vector_norm", "logsumexp"),
    "scan": ("cumsum", "cumprod", "logcumsumexp"),
    "scatter": ("index_add", "segment_add", "scatter_add", "scatter_reduce", "embedding_dense_backward"),
    "softmax": ("softmax", "softmax_backward", "softmax_statistics", "log_probability_backward"),
    "windows": ("windows", "interleaved"),
}
LIBRARY_OF = {f"bicompile::{op}": library for library, ops in KERNELS.items() for op in ops}


def load_for(gm: GraphModule) -> None:
    """Load the libraries of the ops in ``gm`` that compute on the CPU, building several at once.

    Raises:
        NativeBuildError: see :func:`load`.
    """
    needed = set()
    for name, library in LIBRARY_OF.items():
        for node in gm.graph.find_nodes(op="call_function", target=_overload(name)):
            if any(leaf.device.type == "cpu" for leaf in tree_leaves(node.meta["val"]) if isinstance(leaf, Tensor)):
                needed.add(library)
    load(*needed)


def load(*names: str) -> None:
    """Build the libraries ``names`` if need be, load them, and test those binaries that have not been tested yet.

    Raises:
        NativeBuildError: they cannot be built or loaded, or gave bits that their references do not give.
    """
    names = tuple(name for name in names if name not in _loaded)
    for name, path in zip(names, native.load(*names), strict=True):
        for op in KERNELS[name]:
            _overload(op)._dispatch_cache.clear()  # where eager() remembers that there was a stub only
        passed = path.with_suffix(".tested")
        if not passed.exists():
            self_test(name, path)
            passed.touch()
        _loaded.add(name)


_loaded: set[str] = set()


def _overload(op: str) -> OpOverload:
    """``mm`` or ``bicompile::mm`` as torch knows it."""
    return getattr(torch.ops.bicompile, op.removeprefix("bicompile::")).default


def self_test(name: str, path: Path) -> None:
    """Compare small cases of the library ``name`` with its reference, bit for bit.

    Raises:
        NativeBuildError: one differs; the message names it.
    """
    with _disable_current_modes(), torch.no_grad():
        wrong = [case for library, case, ours, theirs in _cases() if library == name and not _same(ours(), theirs())]
    if wrong:
        raise native.NativeBuildError(
            f"{path} gives other bits than its references for {', '.join(wrong)}, so this compiler or processor "
            "breaks the kernels' order. Try another compiler through CXX, or BICOMPILE_ISA=scalar, and report it."
        )


def _same(ours: Any, theirs: Any) -> bool:
    """Whether the results that the reference knows have its bits; the kernel may give more."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        a.dtype == b.dtype and torch.equal(*(t.contiguous().view(integer[t.element_size()]) for t in (a, b)))
        for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=False)
    )


def _cases() -> Iterator[tuple[str, str, Callable[[], Any], Callable[[], Any]]]:
    """Library, name, kernel and reference of each case; lengths cross a block of each order and leave a ragged tail."""
    ours = torch.ops.bicompile
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        scale = torch.exp2(torch.randint(-6, 7, shape, generator=generator, device="cpu").double())
        return (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale).to(dtype)

    def case(name: str, target: OpOverload, known: Callable[..., Any], *args: Any) -> Any:
        return LIBRARY_OF[target.name()], f"{name} in {dtype}", lambda: target(*args), lambda: known(*args)

    for dtype in _DTYPES:
        a, b, x = draw(3, 197, dtype=dtype), draw(19, 197, dtype=dtype).T, draw(3, 77, dtype=dtype)
        index = torch.tensor([1, 0, 1], device="cpu")
        yield case("mm", ours.mm.default, matmul.mm, a, b)
        yield "matmul", f"mm in pieces in {dtype}", *_in_pieces(a, b)
        yield case("sum", ours.sum.default, reduction.sum, x, [1], False, dtype)
        yield case("sum over columns", ours.sum.default, reduction.sum, x.T.contiguous(), [0], False, dtype)
        yield case("amax", ours.amax.default, reduction.amax, x, [1], False, dtype)
        yield case("softmax", ours.softmax.default, softmax.softmax, x, 1, False, dtype)
        yield case("layer_norm", ours.layer_norm.default, norm.layer_norm, x, 1, x[0], None, 1e-5)
        q, k, v = (draw(1, 2, 5, 8, dtype=dtype) for _ in range(3))
        out, lse = attention.sdpa(q, k, v, None, True, 0.3)
        saved = (q, k, v, None, out, lse, True, 0.3, False)
        yield case("sdpa", ours.sdpa.default, _sdpa, q, k, v, None, True, 0.3)
        yield case("sdpa_backward", ours.sdpa_backward.default, _sdpa_backward, v, *saved)
        yield case("cumsum", ours.cumsum.default, scan.cumsum, x, 1, dtype)
        yield case("index_add", ours.index_add.default, scatter.index_add, x[:2], 0, index, x, 1.0)
        yield case("windows", ours.windows.default, windows.windows, x.view(1, 3, 7, 11), *_WINDOWS)
        factors = draw(3, 2, 6, dtype=dtype)
        yield case("mm_windows", ours.mm_windows.default, _mm_windows, factors, x.view(1, 3, 7, 11), *_WINDOWS)
        factors = draw(1, 2, 92, dtype=dtype)
        transposed = ours.mm_windows_transposed.default
        yield case("transposed", transposed, _mm_windows_transposed, factors, x.view(1, 3, 7, 11), *_WINDOWS[:-1])
        yield case("exp", ours.unary.default, _one_by_one, x, "exp")


def _in_pieces(a: Tensor, b: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Kernel and reference of a product whose k come in two pieces."""
    cut, continued = matmul.order_for(a.shape[1], a.dtype).block, torch.ops.bicompile.mm_continued

    def ours() -> Tensor:
        return continued(continued(None, a[:, :cut], b[:cut]), a[:, cut:], b[cut:]).to(a.dtype)

    return ours, lambda: matmul.mm(a, b)


def _mm_windows(factors: Tensor, x: Tensor, *how: Any) -> Tensor:
    return matmul.bmm(factors, windows.windows(x, *how).view(factors.shape[0], factors.shape[2], -1))


def _mm_windows_transposed(factors: Tensor, x: Tensor, *_: Any) -> Tensor:
    return matmul.bmm(factors, windows.windows(x, *_WINDOWS).T[None])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    return attention.sdpa(q, k, v, mask, causal, scale)[0]  # not the log-sum-exp, whose logarithm is torch's


def _sdpa_backward(*args: Any) -> tuple[Tensor, ...]:
    grad, q, k, v, mask, out, _, causal, scale, _ = args
    return attention.sdpa_backward(grad, q, k, v, mask, out, causal, scale)[:3]  # there is no mask to differentiate


def _one_by_one(x: Tensor, name: str) -> Tensor:
    """Elementwise functions have no reference but themselves: the vector code's bits are those of the scalar code."""
    single = [torch.ops.bicompile.unary(number[None], name) for number in x.flatten()]
    return torch.cat(single).view(x.shape)


def _stub(op: str) -> Callable[..., Any]:
    """What runs where no kernel of ``op`` is registered yet, such as for a graph that came from a cache."""

    def load_and_run(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if LIBRARY_OF[op] in _loaded or any(x.device.type != "cpu" for x in tensors):
            kinds = sorted({f"{x.layout} on {x.device}" for x in tensors})
            raise NotImplementedError(f"{op}: expected dense tensors on the CPU or on a GPU, got {', '.join(kinds)}")
        torch.compiler.disable(load)(LIBRARY_OF[op])  # Dynamo may be about, for what called this
        with torch._C._AutoDispatchBelowAutograd():
            return _overload(op)(*args, **kwargs)

    return load_and_run


# An alias key: a kernel for the CPU or for CUDA goes before it.
_STUBS = torch.library.Library("bicompile", "FRAGMENT")
for _op in LIBRARY_OF:
    _STUBS.impl(_op, _stub(_op), "CompositeExplicitAutograd")
