"""Grouped products and products of 8-bit floats: each group has the bits of a product of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicompile
from bicompile.testing import same_bits

ops = torch.ops.bicompile


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(cuts=st.lists(st.integers(0, 40), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_each_group_is_a_product_of_its_own(cuts, seed):
    ends = torch.tensor(sorted(cuts), dtype=torch.int32)
    bounds = [0, *ends.tolist()]
    groups = [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
    rows, weights = _draw(40, 64, seed=seed), _draw(3, 24, 64, seed=seed + 1).transpose(1, 2)
    out = ops.grouped_mm(rows, weights, ends)
    for g, group in enumerate(groups):
        assert same_bits(out[group], ops.mm(rows[group], weights[g]))
    assert same_bits(out[bounds[-1] :], torch.zeros_like(out[bounds[-1] :]))
    left, right = _draw(16, 40, seed=seed), _draw(40, 8, seed=seed + 1)
    out = ops.grouped_mm(left, right, ends)
    for g, group in enumerate(groups):
        assert same_bits(out[g], ops.mm(left[:, group], right[group]))
    left = _draw(3, 16, 8, seed=seed)
    out = ops.grouped_mm(left, right.t(), ends)
    for g, group in enumerate(groups):
        assert same_bits(out[:, group], ops.mm(left[g], right.t()[:, group]))


def test_no_row_belongs_to_two_groups():
    """Ends that descend or are too large: the group that ends before another has ended is empty."""
    rows, weights, ends = _draw(40, 64), _draw(3, 64, 24, seed=1), torch.tensor([10, 5, 10_000], dtype=torch.int32)
    out = ops.grouped_mm(rows, weights, ends)
    assert same_bits(out[:10], ops.mm(rows[:10], weights[0]))
    assert same_bits(out[10:], ops.mm(rows[10:], weights[2]))


class Experts(torch.nn.Module):
    """Sends each token to one of four experts, as mixture-of-experts layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(_draw(4, 32, 64))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        order = expert.argsort(stable=True)
        ends = (expert[:, None] == torch.arange(4)).sum(0).cumsum(0).int()
        product = torch._grouped_mm(x[order], self.weight.transpose(1, 2), offs=ends)
        return torch.empty_like(product).index_copy(0, order, product)


def test_tokens_of_an_expert_do_not_see_each_other():
    torch.manual_seed(0)
    experts, x, expert = Experts(), _draw(48, 64), torch.randint(4, (48,))
    compiled = torch.compile(experts, backend="batch_invariant", dynamic=True)
    whole = compiled(x, expert)
    for m in (1, 2, 7, 31):
        assert same_bits(compiled(x[:m], expert[:m]), whole[:m]), m
    torch.testing.assert_close(whole, experts(x, expert), rtol=2e-2, atol=2e-2)


def test_the_certificate_names_the_grouped_product():
    certificate = bicompile.explain(Experts(), _draw(48, 64), torch.randint(4, (48,)))
    assert any("grouped_mm" in str(node) for node in certificate.nodes)


def test_products_of_8_bit_floats_keep_rows_apart_and_take_scales():
    a, b = _draw(20, 64).to(torch.float8_e4m3fn), _draw(24, 64, seed=1).to(torch.float8_e4m3fn).t()
    rows, columns = torch.linspace(0.5, 2, 20)[:, None], torch.linspace(0.1, 1, 24)[None]
    whole = ops.scaled_mm(a, b, rows, columns, None, torch.bfloat16)
    wanted = (a.double() @ b.double()) * rows * columns
    torch.testing.assert_close(whole.double(), wanted, rtol=1e-2, atol=1e-3)
    for m in (1, 5):
        assert same_bits(ops.scaled_mm(a[:m], b, rows[:m], columns, None, torch.bfloat16), whole[:m])
    bias, one = _draw(24, seed=2), torch.tensor(1.0)
    plain = ops.scaled_mm(a, b, one, one, None, torch.bfloat16)
    assert same_bits(ops.scaled_mm(a, b, one, one, bias, torch.bfloat16), plain + bias)


def test_scaled_mm_is_lowered():
    a, b = _draw(32, 64).to(torch.float8_e4m3fn), _draw(48, 64, seed=1).to(torch.float8_e4m3fn).t()
    one = torch.tensor(1.0)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    got = torch.compile(product, backend="batch_invariant")(a, b)
    assert same_bits(got, ops.scaled_mm(a, b, one, one, None, torch.bfloat16))


def test_bad_input_is_named():
    x, ends = _draw(8, 16), torch.tensor([4, 8], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="an end for each group"):
        torch.ops.bicompile.grouped_mm(x.to("meta"), _draw(3, 16, 8).to("meta"), ends.to("meta"))
    with pytest.raises(RuntimeError, match="expected two matrices of float8"):
        ops.scaled_mm(x.to("meta"), x.t().to("meta"), ends.to("meta"), ends.to("meta"), None, torch.bfloat16)
