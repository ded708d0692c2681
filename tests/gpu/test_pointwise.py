"""Elementwise code that Inductor generates for a GPU: fused or not, static or dynamic, one row or many: equal bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.lowering.gpu.admission import equal_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = 333
SEVERAL_KERNELS = {"max_fusion_size": 6}
"""As a graph of one kernel for all functions would compile for a minute, on one core."""
UNFUSED = {"realize_opcount_threshold": 0, "max_fusion_size": 1}
"""Inductor's settings that give every operation a kernel of its own."""
_SPECIAL = (math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-42, -1e-42, 6e-5, 88.5, -88.5, -104.0, 1.0, -1.0, 0.5, 1e7)

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def _steps(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """A chain in which every product meets a sum and every sum a rounding."""
    a = x * w + y
    b = F.silu(a) * x
    c = b * torch.rsqrt(y.float().abs() + 1e-5).to(b.dtype)
    d = torch.tanh(c) - y * w
    e = F.gelu(d) / (1 + x.abs())
    return torch.exp(-e.float().abs()).to(x.dtype) + e * y


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in (
            "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sigmoid sin cos tan asin acos atan sinh cosh "
            "tanh asinh acosh atanh erf erfc lgamma floor ceil round trunc frac abs neg sign square"
        ).split()
    },
    **{
        name: getattr(F, name)
        for name in (
            "gelu silu softplus mish elu selu hardswish hardsigmoid logsigmoid softsign relu6 leaky_relu tanhshrink"
        ).split()
    },
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "x / 3": lambda x: x / 3,
    "x / 0.7": lambda x: x / 0.7,
    "x / columns": lambda x: x / x.shape[1],
    "x / sqrt(columns)": lambda x: x / math.sqrt(x.shape[1]),
    "x * columns**-0.5": lambda x: x * x.shape[1] ** -0.5,
    "x * (1 / columns)": lambda x: x * (1 / x.shape[1]),
    "x * (0.3 * columns)": lambda x: x * (0.3 * x.shape[1]),
    "x + columns": lambda x: x + x.shape[1],
    "x + index": lambda x: x + torch.arange(x.shape[1], device=x.device).to(x.dtype),
    "3 / x": lambda x: 3 / x,
    "x**3": lambda x: x**3,
    "x**-2": lambda x: x**-2,
    "x**1.7": lambda x: x.abs() ** 1.7,
    "1.7**x": lambda x: 1.7**x,
    "x % 0.3": lambda x: x % 0.3,
    "fmod": lambda x: torch.fmod(x, 0.3),
    "int and back": lambda x: x.clamp(-1e4, 1e4).nan_to_num().int().float().to(x.dtype) * 0.1,
}
BINARY: dict[str, Function] = {
    "steps": _steps,
    "x * w + y": lambda x, y, w: x * w + y,
    "x / y": lambda x, y, w: x / y,
    "pow": lambda x, y, w: x.abs().pow(y.clamp(-3, 3)),
    "atan2": lambda x, y, w: torch.atan2(x, y),
    "hypot": lambda x, y, w: torch.hypot(x, y),
    "lerp": lambda x, y, w: torch.lerp(x, y, w),
    "addcmul": lambda x, y, w: torch.addcmul(x, y, w, value=0.5),
    "addcdiv": lambda x, y, w: torch.addcdiv(x, y, w, value=0.5),
    "maximum": lambda x, y, w: torch.maximum(x, y) - torch.minimum(y, w),
    "logaddexp": lambda x, y, w: torch.logaddexp(x, y),
    "where": lambda x, y, w: torch.where(x > 0, y * x, w - x),
    "sub": lambda x, y, w: torch.sub(x, y, alpha=0.3),
    "rotary": lambda x, y, w: x * torch.cos(w) + y.flip(-1) * torch.sin(w),
    "swiglu": lambda x, y, w: F.silu(x * w) * (y + 1),
}
FUNCTIONS: dict[str, Function] = {
    **BINARY,
    # partly of an input, partly of what is computed before and may be fused
    **{name: lambda x, y, w, fn=fn: fn(torch.where(w > 0, x, x * w + y)) for name, fn in UNARY.items()},
}
GROUP = 36
"""Functions of one graph: fewer take longer in total, more make a kernel that is unlike any user's."""


def _inputs(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors [rows, COLUMNS] over many binades, the first with special values in every row."""
    generator = torch.Generator().manual_seed(7)
    xs = []
    for _ in range(3):
        scale = torch.exp2(torch.randint(-9, 5, (rows, COLUMNS), generator=generator).float())
        xs.append((torch.randn(rows, COLUMNS, generator=generator) * scale).to(dtype))
    xs[0][:, 5 : 5 + len(_SPECIAL)] = torch.tensor(_SPECIAL).to(dtype)
    x, y, w = (each.cuda() for each in xs)
    return x, y, w


def _groups() -> Iterator[dict[str, Function]]:
    names = iter(FUNCTIONS)
    while group := list(itertools.islice(names, GROUP)):
        yield {name: FUNCTIONS[name] for name in group}


def _compiled(
    group: dict[str, Function], dynamic: bool, options: dict[str, int] = SEVERAL_KERNELS
) -> Callable[..., list[Tensor]]:
    torch._dynamo.reset()
    functions = list(group.values())
    graph = lambda *args: [fn(*args) for fn in functions]  # noqa: E731
    return torch.compile(graph, backend="batch_invariant", dynamic=dynamic, options=options)


def _shifted(x: Tensor) -> Tensor:
    """The same values one element behind an aligned address, with rows 2 elements further apart."""
    wide = x.new_empty(x.shape[0] * (x.shape[1] + 2) + 1)
    return wide[1:].view(x.shape[0], x.shape[1] + 2)[:, : x.shape[1]].copy_(x)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("number", range(-(-len(FUNCTIONS) // GROUP)))
def test_no_situation_shows_in_the_bits(number, dtype):
    group = list(_groups())[number]
    inputs = _inputs(37, dtype)
    static = _compiled(group, dynamic=False)
    whole = static(*inputs)
    others = {
        "permuted": [y.flip(0) for y in static(*(x.flip(0) for x in inputs))],
        "unfused": _compiled(group, dynamic=False, options=UNFUSED)(*inputs),
    }
    alone = _compiled(group, dynamic=False)
    parts = [alone(*(_shifted(x[row : row + 1]) for x in inputs)) for row in (0, 36)]
    dynamic = _compiled(group, dynamic=True)
    others["dynamic"] = dynamic(*inputs)
    others["dynamic, 5 rows"] = dynamic(*(x[:5] for x in inputs))
    wrong = [
        f"{name}: {situation}"
        for situation, results in others.items()
        for name, one, other in zip(group, whole, results, strict=True)
        if not equal_bits(one[: len(other)], other)
    ]
    for row, part in zip((0, 36), parts, strict=True):
        wrong += [
            f"{name}: row {row} alone, at an odd offset"
            for name, one, other in zip(group, whole, part, strict=True)
            if not equal_bits(one[row : row + 1], other)
        ]
    assert not wrong, wrong


def test_the_check_catches_stock_inductor():
    """Without our settings a fused chain keeps its intermediate results in float32 and contracts products with sums."""
    inputs = _inputs(37, torch.bfloat16)
    torch._dynamo.reset()
    fused = torch.compile(_steps, backend="inductor", dynamic=False)(*inputs)
    torch._dynamo.reset()
    unfused = torch.compile(_steps, backend="inductor", dynamic=False, options=UNFUSED)(*inputs)
    assert not equal_bits(fused, unfused)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_inputs_do_not_show_the_batch(dtype):
    def gradients(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = fn(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    inputs = _inputs(37, dtype)
    compiled = torch.compile(_steps, backend="batch_invariant", dynamic=False)
    whole, alone = gradients(compiled, inputs), gradients(compiled, tuple(x[3:4] for x in inputs))
    torch._dynamo.reset()
    dynamic = gradients(torch.compile(_steps, backend="batch_invariant", dynamic=True), inputs)
    for one, other, symbolic in zip(whole, alone, dynamic, strict=True):
        assert equal_bits(one[3:4], other)
        assert equal_bits(one, symbolic)


def test_ties_are_broken_by_place():
    """Trap 16: which of equal elements comes first must not follow the number of rows."""
    generator = torch.Generator().manual_seed(3)
    for columns in (8, 300, 5000):
        x = torch.randint(-3, 4, (600, columns), generator=generator).float().cuda()
        x[:, 1] = -0.0

        def order(x: Tensor) -> tuple[Tensor, ...]:
            values, indices = torch.sort(x, dim=-1, descending=True)
            best, at = torch.topk(x, 5, dim=-1)
            least, where = torch.topk(x, 5, dim=-1, largest=False)
            return values, indices, best, at, least, where, x.argmax(-1), x.argmin(-1), *x.max(-1)

        torch._dynamo.reset()
        static = torch.compile(order, backend="batch_invariant", dynamic=False)
        whole = static(x)
        wanted = x.cpu().sort(dim=-1, descending=True, stable=True)
        assert torch.equal(whole[1].cpu(), wanted.indices)
        assert torch.equal(whole[3].cpu(), wanted.indices[:, :5])
        assert torch.equal(whole[5].cpu(), x.cpu().sort(dim=-1, stable=True).indices[:, :5])
        for rows in (1, 2, 17):
            for one, other in zip(whole, static(x[:rows]), strict=True):
                assert equal_bits(one[:rows], other), (columns, rows)
        torch._dynamo.reset()
        for one, other in zip(whole, torch.compile(order, backend="batch_invariant", dynamic=True)(x), strict=True):
            assert equal_bits(one, other), (columns, "dynamic")


def test_a_random_op_is_refused():
    with pytest.raises(bicompile.UnsupportedOpError, match="random"):
        torch.compile(torch.rand_like, backend="batch_invariant")(torch.randn(4, device="cuda"))
