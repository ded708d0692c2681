"""Controls: the checks that ``batch_invariant`` passes catch stock PyTorch and a broken schedule.

A check that never fails checks nothing.  Which op is variant depends on the CPU, so each control is a family with
several candidates, of which the kit must catch at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import find, settings
from torch import Tensor

from bicompile.errors import BatchInvarianceError
from bicompile.testing import assert_batch_invariant, same_bits
from bicompile.testing.strategies import Batch, batches, scattered_values

pytestmark = pytest.mark.optimised
# Where MKL is not torch's BLAS, kernels are others, and a family may happen to be invariant.
needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="controls were measured with MKL on x86-64"
)


@dataclass(frozen=True)
class Candidate:
    """A function of one batch and the rows to try it on; ``situations`` are those in which it was seen to vary."""

    fn: Callable[[Tensor], Tensor]
    row_shape: tuple[int, ...]
    num_rows: int = 9
    dtype: torch.dtype = torch.float32
    situations: tuple[str, ...] = ("alone",)

    def rows(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.num_rows, *self.row_shape, generator=generator).to(self.dtype)

    def is_caught(self, compiled: Callable[[Tensor], Tensor] | None = None) -> bool:
        try:
            assert_batch_invariant(compiled or self.fn, self.rows(), situations=self.situations)
        except BatchInvarianceError:
            return True
        return False


def _weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype) / columns**0.5


def _linear(columns: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    weight = _weight(256, columns, dtype)
    return lambda x: F.linear(x, weight)


def _attend(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (4, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _var(x: Tensor) -> Tensor:
    return x.var(-1)


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1)


# One decode step, 1 row against 2 to 11: MKL has one order for one row, one for blocks of 4, one for the tail.
_DECODE_STEP = _linear(576)
DECODE_STEPS = [Candidate(_DECODE_STEP, (576,), num_rows) for num_rows in range(2, 12)]
RAGGED_POINTWISE = [Candidate(fn, (13,)) for fn in (_gelu_tanh, F.silu, torch.sigmoid, F.softplus)]
SINGLE_ELEMENTS = [Candidate(fn, (1,), 33) for fn in (torch.exp, torch.erf, torch.log1p, torch.tanh)]
MOMENTS = [Candidate(_layer_norm, (1000,)), Candidate(_var, (1000,)), Candidate(_sum, (6,))]
LONG_ROWS = [Candidate(_sum, (49152,), situations=("alone", "sub-batch"))]
TRANSPOSED = [Candidate(_rms_norm, (1000,), 5, situations=("transposed",))]
TRANSPOSED_ATTENTION = [
    Candidate(_attend, (17, 128), 5, dtype, ("transposed",)) for dtype in (torch.float32, torch.bfloat16)
]

EAGER = {
    "linear": DECODE_STEPS,
    "linear in double": [Candidate(_linear(576, torch.float64), (576,), dtype=torch.float64)],
    "pointwise": RAGGED_POINTWISE,
    "sum of long rows": LONG_ROWS,
    "rms_norm of transposed rows": TRANSPOSED,
    "attention over transposed rows": TRANSPOSED_ATTENTION,
}

INDUCTOR = {
    "linear": DECODE_STEPS[:3],
    "pointwise": [Candidate(F.softplus, (width,)) for width in (21, 37, 5)],
    "pointwise on one element": SINGLE_ELEMENTS,
    "layer_norm, var and sum": MOMENTS,
}


@needs_mkl
@pytest.mark.parametrize("family", EAGER)
def test_stock_eager_is_caught(family: str):
    assert any(candidate.is_caught() for candidate in EAGER[family])


@needs_mkl
@pytest.mark.parametrize("family", INDUCTOR)
def test_stock_inductor_is_caught(family: str):
    assert any(candidate.is_caught(torch.compile(candidate.fn)) for candidate in INDUCTOR[family])


@pytest.mark.parametrize("family", sorted(EAGER.keys() | INDUCTOR.keys()))
def test_batch_invariant_passes_the_same_checks(family: str):
    candidates = EAGER.get(family, []) + INDUCTOR.get(family, [])
    compiled = {fn: torch.compile(fn, backend="batch_invariant") for fn in {c.fn for c in candidates}}
    for candidate in candidates:
        assert_batch_invariant(compiled[candidate.fn], candidate.rows(), situations=candidate.situations)


@needs_mkl
def test_search_finds_a_small_batch_that_stock_linear_gets_wrong():
    linear = _linear(576)

    def is_caught(batch: Batch) -> bool:
        try:
            assert_batch_invariant(linear, batch.tensor(), situations=["alone", "permuted"])
        except BatchInvarianceError:
            return True
        return False

    found = find(batches(row_shape=(576,), dtype=torch.float32), is_caught, settings=settings(max_examples=200))
    assert found.num_rows <= 4


# Attention over the sequence: padding, and prefill against decode.


def _padded_attention(qkv: Tensor, padding: int) -> Tensor:
    """Causal attention of ``[3, H, T, D]`` with ``padding`` masked positions on the left; returns the valid ones."""
    q, k, v = F.pad(qkv, (0, 0, padding, 0)).unsqueeze(1)
    valid = torch.arange(q.shape[2]) >= padding
    mask = valid.expand(q.shape[2], -1).tril() | torch.eye(q.shape[2], dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, padding:]


def _prefill(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _decode(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unsqueeze(1)
    steps = [
        F.scaled_dot_product_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        for t in range(q.shape[2])
    ]
    return torch.cat(steps, dim=2)


def _sequences(lengths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(3, 4, n, 32, generator=torch.Generator().manual_seed(n)).to(dtype) for n in lengths]


@needs_mkl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_attention_changes_with_left_padding(dtype: torch.dtype):
    assert any(
        not same_bits(_padded_attention(qkv, 0), _padded_attention(qkv, padding))
        for qkv in _sequences((12, 33, 64), dtype)
        for padding in (1, 3, 8)
    )


@needs_mkl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_attention_differs_between_prefill_and_decode(dtype: torch.dtype):
    assert any(not same_bits(_prefill(qkv), _decode(qkv)) for qkv in _sequences((33, 64), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_attention_hides_left_padding(dtype: torch.dtype):
    padded = torch.compile(_padded_attention, backend="batch_invariant", dynamic=True)
    for qkv in _sequences((12, 33, 64), dtype):
        for padding in (1, 3, 8):
            assert same_bits(padded(qkv, 0), padded(qkv, padding))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_attention_prefills_as_it_decodes(dtype: torch.dtype):
    attend = torch.compile(F.scaled_dot_product_attention, backend="batch_invariant", dynamic=True)
    for qkv in _sequences((33, 64), dtype):
        q, k, v = qkv.unsqueeze(1)
        full = attend(q, k, v, is_causal=True)
        for t in range(0, q.shape[2], 7):
            step = attend(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
            assert same_bits(step[:, :, 0], full[:, :, t])


# A broken schedule: the block of a matmul is part of its order, and must not follow the number of rows.


def _blocked_product(x: Tensor, weight: Tensor, block: int) -> Tensor:
    """``x @ weight.T`` with one chain per block of the reduced dim, blocks added in ascending order."""
    total = torch.zeros(len(x), len(weight))
    for start in range(0, x.shape[1], block):
        chain = torch.zeros_like(total)
        for k in range(start, min(start + block, x.shape[1])):
            chain = chain + x[:, k : k + 1] * weight[:, k]
        total = total + chain
    return total


def test_a_schedule_whose_block_follows_the_batch_is_caught():
    x, weight = scattered_values((5, 200), torch.float32, 0), _weight(24, 200)
    assert_batch_invariant(lambda x: _blocked_product(x, weight, 192), x)
    with pytest.raises(BatchInvarianceError):
        assert_batch_invariant(lambda x: _blocked_product(x, weight, 192 if len(x) > 1 else 64), x)
