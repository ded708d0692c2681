"""The backend end to end on a GPU: bits, training, CUDA graphs, caches, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.testing import same_bits


class Block(nn.Module):
    """Two products, a norm and a softmax: one of each thing that stock PyTorch varies."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(200, 640), nn.Linear(640, 32)
        self.norm = nn.LayerNorm(640)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(F.silu(self.up(x)))).softmax(-1)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def block(request):
    torch.manual_seed(0)
    return Block().to("cuda", request.param)


def rows(block: nn.Module, n: int) -> Tensor:
    """``n`` input rows in the block's dtype."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 200, generator=generator).to("cuda", next(block.parameters()).dtype)


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_keep_their_bits_alone_and_with_autograd(block, dynamic):
    compiled = torch.compile(block, backend="batch_invariant", dynamic=dynamic)
    x = rows(block, 37)
    with torch.no_grad():
        whole = compiled(x)
        assert same_bits(compiled(x[2:3])[0], whole[2])
        assert same_bits(compiled(x.flip(0)).flip(0), whole)
        among_nans = torch.full_like(x, float("nan"))
        among_nans[2] = x[2]
        assert same_bits(compiled(among_nans)[2], whole[2])
    trained = x.clone().requires_grad_()
    y = compiled(trained)
    assert same_bits(y.detach(), whole)
    y.backward(torch.ones_like(y))
    alone = x[2:3].clone().requires_grad_()
    y = compiled(alone)
    y.backward(torch.ones_like(y))
    assert same_bits(alone.grad[0], trained.grad[2])
    exact = block.double()(x.double())
    assert (whole.double() - exact).abs().max() < 8 * torch.finfo(whole.dtype).eps * exact.abs().max()


def test_training_steps_repeat_bit_for_bit(block):
    """P4: the weights' gradients sum over the batch, in one order."""
    compiled = torch.compile(block, backend="batch_invariant")
    x = rows(block, 300)
    gradients = []
    for _ in range(3):
        block.zero_grad()
        compiled(x).float().square().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters()])
    assert same_bits(gradients[0], gradients[1]) and same_bits(gradients[0], gradients[2])


def test_cuda_graphs_replay_the_same_bits(block):
    """``reduce-overhead``: the first calls warm up and record, later ones replay; new rows go through old graphs."""
    with torch.no_grad():
        plain = torch.compile(block, backend="batch_invariant", dynamic=False)
        wanted = {n: plain(rows(block, n)).clone() for n in (1, 4, 33)}
        torch._dynamo.reset()
        graphed = torch.compile(block, backend="batch_invariant", dynamic=False, mode="reduce-overhead")
        for turn in range(4):
            for n, want in wanted.items():
                torch.compiler.cudagraph_mark_step_begin()
                assert same_bits(graphed(rows(block, n)), want), (turn, n)


def test_refusal_names_op_line_and_what_to_do():
    def unknown(x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)

    with pytest.raises(bicompile.UnsupportedOpError, match=r"(?s)_linalg_svd.*test_backend.py:\d+.*allow"):
        torch.compile(unknown, backend="batch_invariant")(torch.randn(4, 3, 3, device="cuda"))


def test_explain_lists_lowered_ops_on_the_gpu(block):
    certificate = bicompile.explain(block, rows(block, 5))
    assert certificate.ok, str(certificate)
    assert {"bicompile.softmax.default", "bicompile.layer_norm.default"} <= {node.op for node in certificate.lowered}


def test_graphs_over_two_devices_compile():
    """A constant on the CPU beside rows on the GPU, and a sum on either."""

    def mixed(x: Tensor, table: Tensor) -> Tensor:
        return x.sum(-1) * 2.0 + table.sum(-1).to(x.device)

    compiled = torch.compile(mixed, backend="batch_invariant")
    x, table = torch.randn(5, 300, device="cuda"), torch.randn(5, 300)
    assert same_bits(compiled(x, table)[1:2], compiled(x[1:2], table[1:2]))


_SECOND_PROCESS = """
    import json, torch, bicompile
    from torch._dynamo.utils import counters
    torch.manual_seed(0)
    weight = torch.randn(96, 200).cuda()
    def f(x):
        return torch.nn.functional.silu(x @ weight.T).softmax(-1)
    x = torch.linspace(-1, 1, 600).view(3, 200).cuda()
    y = torch.compile(f, backend="batch_invariant")(x)
    print(json.dumps(dict(aot=counters["aot_autograd"]["autograd_cache_hit"], bits=y.view(torch.int32).tolist())))
"""


def test_second_process_hits_the_cache_with_the_same_bits(tmp_path):
    def run() -> dict[str, object]:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_SECOND_PROCESS)], capture_output=True, text=True, env=env
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    first, second = run(), run()
    assert (first["aot"], second["aot"]) == (0, 1)
    assert first["bits"] == second["bits"]
