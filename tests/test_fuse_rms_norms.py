"""RMS norms on a GPU become one op; what does not fit its pattern stays as it is.  Traced with fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from bicompile.decompositions import decomposition_table
from bicompile.passes.fuse_rms_norms import fuse_rms_norms_pass
from bicompile.passes.lower_reductions import lower_reductions_pass

aten, bicompile = torch.ops.aten, torch.ops.bicompile


def llama(x: Tensor, w: Tensor) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (scaled * (1.0 + w.float())).type_as(x)


def without_weight(x: Tensor, w: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def graph_of(
    fn: Callable[..., object], dtype: torch.dtype, device: str = "cuda", shape: tuple[int, ...] = (2, 5, 64)
) -> GraphModule:
    with FakeTensorMode():
        x, w = torch.empty(shape, dtype=dtype, device=device), torch.empty(shape[-1], dtype=dtype, device=device)
        gm = make_fx(fn, decomposition_table=decomposition_table())(x, w)
    lower_reductions_pass(gm)
    return gm


def ops_of(gm: GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("fn", "round_first", "has_weight"), [(llama, True, True), (gemma, False, True), (without_weight, True, False)]
)
def test_norm_becomes_one_op(fn: Callable[..., object], round_first: bool, has_weight: bool):
    gm = graph_of(fn, torch.bfloat16)
    before = next(iter(gm.graph.find_nodes(op="output"))).args[0].meta["val"]
    assert fuse_rms_norms_pass(gm).modified
    (norm,) = gm.graph.find_nodes(op="call_function", target=bicompile.rms_norm.default)
    assert norm.args[2:] == (1e-6, round_first) and (norm.args[1] is not None) == has_weight
    assert bicompile.mean_square.default not in ops_of(gm) and aten.rsqrt.default not in ops_of(gm)
    after = norm.meta["val"]
    assert (after.shape, after.dtype, after.stride()) == (before.shape, before.dtype, before.stride())
    assert not fuse_rms_norms_pass(gm).modified


def test_norm_in_float32_becomes_one_op():
    gm = graph_of(llama, torch.float32)
    assert fuse_rms_norms_pass(gm).modified
    assert ops_of(gm) == [bicompile.rms_norm.default]


def also_returns(part: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def norm(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.float().pow(2).mean(-1, keepdim=True)
        root = torch.rsqrt(mean + 1e-6)
        scaled = x.float() * root
        return w * scaled.to(x.dtype), {"mean": mean, "root": root, "scaled": scaled}[part]

    return norm


def over_the_first_dim(x: Tensor, w: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(0, keepdim=True) + 1e-6)).to(x.dtype)


def of_another_tensor(x: Tensor, w: Tensor) -> Tensor:
    return (w.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize(
    "fn", [also_returns("mean"), also_returns("root"), also_returns("scaled"), over_the_first_dim, of_another_tensor]
)
def test_near_misses_are_left_alone(fn: Callable[..., object]):
    gm = graph_of(fn, torch.bfloat16)
    assert bicompile.mean_square.default in ops_of(gm)
    assert not fuse_rms_norms_pass(gm).modified


def test_weight_that_is_not_one_is_not_taken_for_it():
    gm = graph_of(lambda x, w: x * llama(x, w), torch.bfloat16)
    assert fuse_rms_norms_pass(gm).modified
    assert ops_of(gm) == [bicompile.rms_norm.default, aten.mul.Tensor]


@pytest.mark.parametrize(("device", "shape"), [("cpu", (2, 64)), ("cuda", (2, 20_000))])
def test_other_devices_and_long_rows_are_left_alone(device: str, shape: tuple[int, ...]):
    assert not fuse_rms_norms_pass(graph_of(llama, torch.bfloat16, device, shape)).modified
