"""Cross entropy of a linear layer in chunks on a GPU: the bits of the two functions, and less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.lowering.softmax import linear_cross_entropy as lowering
from bicompile.testing import same_bits

N, K, V = 700, 264, 5003


def drawn(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    layer = [torch.randn(s, generator=g, device="cuda").to(dtype) for s in ((N, K), (V, K), (V,))]
    target = torch.randint(0, V, (N,), generator=g, device="cuda")
    target[3] = -100
    return layer, target


def two(hidden: Tensor, matrix: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, matrix, bias).float(), target)


def one(hidden: Tensor, matrix: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return bicompile.linear_cross_entropy(hidden, matrix, target, linear_bias=bias, dtype=torch.float32)


def value_and_gradients(fn: Callable[..., Tensor], layer: list[Tensor], target: Tensor) -> tuple[Any, ...]:
    layer = [t.detach().requires_grad_() for t in layer]
    loss = fn(*layer, target)
    return loss.detach(), *torch.autograd.grad(loss, layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_one_op_in_chunks_has_the_bits_of_two_functions_compiled_and_not(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    layer, target = drawn(dtype)
    with bicompile.eager():
        expected = value_and_gradients(two, layer, target)
        whole = value_and_gradients(one, layer, target)
    monkeypatch.setattr(lowering, "CHUNK_BYTES", 1 << 20)
    with bicompile.eager():
        chunked = value_and_gradients(one, layer, target)
    compiled = value_and_gradients(torch.compile(two, backend="batch_invariant"), layer, target)
    for found in (whole, chunked, compiled):
        assert same_bits(found, expected)


def test_peak_memory_is_far_below_the_scores():
    rows, classes, width = 16384, 65536, 256
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, classes, (rows,), device="cuda")
    loss = torch.compile(lambda h, w: F.cross_entropy(F.linear(h, w).float(), target), backend="batch_invariant")
    loss(hidden, weight).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(hidden, weight).backward()
    assert torch.cuda.max_memory_allocated() - before < rows * classes * 2 / 4
