"""``bicompile.eager()`` on a GPU: the bits of compiled code, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.testing import same_bits

# Ops that run as PyTorch has them, ops that are compiled one by one, and ops that are made of others.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "x + y": lambda x: x + x.flip(0),
    "x * 0.7": lambda x: x * 0.7,
    "x - 0.3": lambda x: x - 0.3,
    "1 - x": lambda x: 1 - x,
    "x / 0.7": lambda x: x / 0.7,
    "x / y": lambda x: x / x.flip(0),
    "int / 7": lambda x: (x * 10).int() / 7,
    "sqrt": lambda x: x.abs().sqrt(),
    "half": lambda x: x.half(),
    "where": lambda x: torch.where(x > 0, x, -x.flip(0)),
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "log": torch.log,
    "rsqrt": torch.rsqrt,
    "x ** 3": lambda x: x**3,
    "x + 0.3 * y": lambda x: torch.add(x, x.flip(0), alpha=0.3),
    "addcmul": lambda x: torch.addcmul(x, x.flip(0), x, value=0.3),
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "lerp": lambda x: torch.lerp(x, x.flip(0), 0.3),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "clamp": lambda x: x.clamp(-1, 1),
}
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42, -1e-42, 3e38, 88.5, -104.0, 1.0, 2.0)


def numbers(dtype: torch.dtype) -> Tensor:
    """Values over many binades, special ones among them, [64, 66]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 66, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(torch.randint(-20, 7, x.shape, generator=generator).double())
    x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64)
    return x.to(dtype).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_have_the_bits_of_compiled_code(dtype: torch.dtype):
    x = numbers(dtype)
    compiled = torch.compile(lambda x: [fn(x) for fn in FUNCTIONS.values()], backend="batch_invariant", fullgraph=True)
    with bicompile.eager():
        ours = {name: fn(x) for name, fn in FUNCTIONS.items()}
    different = [n for (n, y), known in zip(ours.items(), compiled(x), strict=True) if not same_bits(y, known)]
    assert not different


def test_elements_have_the_same_bits_wherever_they_lie():
    """One row, one element, odd offsets, other strides, broadcast operands."""
    x = numbers(torch.bfloat16)
    with bicompile.eager():
        for fn in (torch.exp, lambda x: x / 0.7, lambda x: torch.addcmul(x, x[:, :1], x[:1, :1], value=0.3)):
            whole = fn(x)
            assert same_bits(fn(x.t().contiguous().t()), whole)
        for fn in (torch.exp, lambda x: x / 0.7):
            whole = fn(x)
            assert same_bits(fn(x[5:6]), whole[5:6])
            assert same_bits(fn(x[5, 3:4]), whole[5, 3:4])
            assert same_bits(fn(x.reshape(-1)[3:]), whole.reshape(-1)[3:])
            assert same_bits(fn(x[:, ::2]), whole[:, ::2])
            assert same_bits(fn(x[0, 0]), whole[0, 0])
            assert fn(x[:0]).shape == (0, 66)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(64), nn.RMSNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.up, self.down = nn.Linear(64, 200), nn.Linear(200, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.silu(self.up(self.rms(x))))


def test_block_has_the_bits_of_compiled_code_with_gradients():
    torch.manual_seed(0)
    block, x = Block().cuda().bfloat16(), torch.randn(4, 5, 64).bfloat16().cuda()

    def run(module: Any, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = module(x)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        return [y.detach(), x.grad]

    with bicompile.eager():
        whole = run(block, x)
        assert same_bits(run(block, x[2:3]), [t[2:3] for t in whole])
        assert same_bits(run(block, x.flip(0)), [t.flip(0) for t in whole])
    assert same_bits(run(torch.compile(block, backend="batch_invariant", fullgraph=True), x), whole)


def test_inference_mode_gives_the_bits_of_no_grad():
    """Also for an op like the fused RMS norm, which is composite on the CPU and whole on a GPU."""
    torch.manual_seed(0)
    block, x = Block().cuda().bfloat16().eval(), torch.randn(4, 5, 64).bfloat16().cuda()
    with torch.no_grad(), bicompile.eager():
        whole = block(x)
    with torch.inference_mode(), bicompile.eager():
        assert same_bits(block(x), whole)


def test_sampling_loop_picks_the_same_tokens_in_any_batch():
    torch.manual_seed(0)
    head, table = nn.Linear(64, 1000).cuda(), nn.Embedding(1000, 64).cuda()

    @torch.no_grad()
    def generate(tokens: Tensor) -> Tensor:
        for _ in range(4):
            logits = head(table(tokens[:, -1])) / 0.7
            top, index = torch.topk(logits, 50)
            kept = top.softmax(-1).cumsum(-1) < 0.9
            scores = torch.where(kept, F.log_softmax(top, -1), -torch.inf).exp()
            tokens = torch.cat([tokens, index.gather(1, scores.sort(descending=True)[1][:, 3:4])], 1)
        return tokens

    prompts = torch.arange(20).view(20, 1).cuda()
    with bicompile.eager():
        whole = generate(prompts)
        for row in (0, 7):
            assert torch.equal(generate(prompts[row : row + 1])[0], whole[row])


def test_what_is_not_proven_is_refused():
    x = torch.randn(4, 3, 3).cuda()
    with bicompile.eager():
        for call in (lambda: torch.linalg.svdvals(x), lambda: torch.multinomial(x[0].abs(), 1), lambda: x.mode()):
            with pytest.raises(bicompile.UnsupportedOpError, match="no batch-invariant form"):
                call()
