"""Certificates: classes, cross-batch sums found through the batch symbol, refusals listed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bicompile
from bicompile.certificate import CertifiedGraph
from bicompile.passes import batch_symbols


def _cross_batch_ops(fn, *args):
    return {
        node.op.removeprefix("bicompile.").removesuffix(".default") for node in bicompile.explain(fn, *args).cross_batch
    }


LINEAR = nn.Linear(32, 16)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: LINEAR(x).softmax(-1),
        lambda x: (x.reshape(-1, 32) @ LINEAR.weight.detach().T).view(x.shape[0], 5, 16),
        lambda x: x.cumsum(1),
        lambda x: x.amax((1, 2)),
        lambda x: F.layer_norm(x, (32,)),
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]),
        nn.BatchNorm1d(5).eval(),
    ],
    ids=["linear-softmax", "flattened", "scan", "max", "norm", "attention", "batch-norm-eval"],
)
@pytest.mark.parametrize("rows", [1, 6])
def test_what_stays_inside_a_row_is_not_cross_batch(fn, rows):
    with torch.no_grad():
        certificate = bicompile.explain(fn, torch.randn(rows, 5, 32))
    assert certificate.ok and certificate.batch_is_symbolic
    assert not certificate.cross_batch
    assert {node.kind for node in certificate.nodes} <= {"lowered", "exact", "elementwise"}


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (lambda x: x - x.mean(0), "mean"),
        (lambda x: x.reshape(-1).sum(), "sum"),
        (lambda x: (x[:, 0] @ x[:, 0].T).softmax(-1), "softmax"),
        (nn.BatchNorm1d(5).train(), "var"),
        (lambda x: x.cumsum(0), "cumsum"),
        (lambda x: torch.zeros(3, 32).index_add(0, torch.arange(x.shape[0]) % 3, x[:, 0]), "index_add"),
    ],
)
def test_what_crosses_the_batch_is_named(fn, op):
    with torch.no_grad():
        assert op in _cross_batch_ops(fn, torch.randn(6, 5, 32))


def test_backward_lists_weight_gradients_and_nothing_else():
    certificate = bicompile.explain(LINEAR, torch.randn(6, 5, 32, requires_grad=True))
    assert certificate.ok
    shapes = {node.shape for node in certificate.cross_batch}
    assert shapes and all("[16" in shape or "[1, 16" in shape for shape in shapes)
    assert LINEAR.weight.grad is None


def test_refusals_are_listed_with_reason_and_line_and_not_raised():
    certificate = bicompile.explain(lambda x: torch.linalg.pinv(x), torch.randn(4, 3, 3))
    assert not certificate.ok
    (node,) = certificate.refused
    assert node.op.startswith("aten.linalg_pinv") and node.reason and "test_explain.py" in node.source
    assert "NOT proven" in str(certificate) and "linalg_pinv" in str(certificate)


def test_graph_breaks_are_named():
    def broken(x):
        y = x.sum(-1)
        torch._dynamo.graph_break()
        return y * 2

    certificate = bicompile.explain(broken, torch.randn(3, 4))
    assert certificate.graph_breaks and not certificate.ok


def test_json_holds_what_the_table_shows():
    certificate = bicompile.explain(LINEAR, torch.randn(6, 5, 32))
    found = json.loads(certificate.to_json())
    assert found["ok"] is True and found["subject"] == "Linear" and found["inputs"] == ["args[0]: float32[6, 5, 32]"]
    assert found["counts"]["lowered"] == len(certificate.lowered)
    assert found["proof"] in str(certificate)
    assert [node.pop("graph") for node in found["nodes"]] == [g.name for g in certificate.graphs for _ in g.nodes]
    assert [tuple(node["extent"]) for node in found["nodes"]] == [node.extent for node in certificate.nodes]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16))

    def forward(self, x):
        return self.layers(x).softmax(-1)


@pytest.mark.parametrize(
    "module", [Stack(), Stack().layers], ids=["with a line of the user's", "of torch's code alone"]
)
def test_every_node_says_where_it_comes_from(module):
    certificate = bicompile.explain(module, torch.randn(6, 32, requires_grad=True))
    assert [graph.name for graph in certificate.graphs] == ["forward", "backward"]
    assert not [node for node in certificate.nodes if not node.source and not node.module]
    assert all(node.order and node.extent for node in (*certificate.lowered, *certificate.cross_batch))
    inner = {node.module.removeprefix("layers.") for node in (*certificate.lowered, *certificate.cross_batch)}
    assert inner >= {"0 (Linear)", "1 (LayerNorm)"}
    if isinstance(module, Stack):
        assert all("test_explain.py" in node.source for node in certificate.nodes)


def test_graphs_stand_in_the_order_in_which_they_ran():
    def broken(x):
        y = x.softmax(-1)
        torch._dynamo.graph_break()
        return y.cumsum(-1)

    certificate = bicompile.explain(broken, torch.randn(3, 4, requires_grad=True))
    assert [graph.name for graph in certificate.graphs] == ["forward 1", "forward 2", "backward 1", "backward 2"]
    first = [next(node.op for node in graph.nodes if node.op.startswith("bicompile")) for graph in certificate.graphs]
    assert [op.split(".")[1] for op in first] == ["softmax", "cumsum", "cumsum", "softmax_backward"]


def test_the_proof_names_the_symbols_that_no_lowered_order_holds():
    certificate = bicompile.explain(lambda x: (LINEAR(x).softmax(-1), x.sum(0)), torch.randn(6, 32))
    (symbol,) = certificate.batch_symbols
    assert f"({symbol})" in certificate.proof and f"({len(certificate.lowered)} of them)" in certificate.proof
    assert {node.symbols for node in certificate.lowered} == {()}
    assert {node.symbols for node in certificate.cross_batch} == {(symbol,)}
    forged = dataclasses.replace(certificate.cross_batch[0], kind="lowered")
    with pytest.raises(AssertionError, match="follows the batch"):
        dataclasses.replace(certificate, graphs=(CertifiedGraph("inference", (forged,)),)).proof  # noqa: B018
    assert "fixed" in dataclasses.replace(certificate, batch_symbols=()).proof


def test_every_op_of_ours_that_combines_elements_has_an_extent():
    ours = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("bicompile::")}
    without = {name for name in ours if f"bicompile.{name}" not in batch_symbols._EXTENTS}
    elementwise, called_by_others = {"unary", "binary", "log_probability_backward"}, {"segment_add"}
    copied, taken_apart = {"windows", "interleaved"}, {"linear_cross_entropy"}  # while it is traced
    assert without == elementwise | called_by_others | copied | taken_apart


def test_compiled_functions_can_be_explained_too():
    compiled = torch.compile(LINEAR, backend="batch_invariant")
    assert bicompile.explain(compiled, torch.randn(3, 5, 32)).lowered


def test_a_size_that_dynamo_marked_before_is_not_taken_for_the_batch():
    weight = torch.randn(5, 7)

    def fn(x: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).sum(1)

    torch.compile(fn, backend="eager", dynamic=True)(torch.randn(3, 7))
    torch._dynamo.reset()
    assert [node.kind for node in bicompile.explain(fn, torch.randn(3, 7)).lowered] == ["lowered", "lowered"]
