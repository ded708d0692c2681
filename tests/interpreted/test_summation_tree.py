"""The GPU's kernels add as their orders say, under Triton's interpreter: all but what ``tl.dot`` adds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from summing import (
    POSITIVE,
    POSITIVE_ATTENTION,
    REDUCTIONS,
    SCANS,
    SCATTERS,
    Sum,
    assert_same_tree,
    check_triples,
    declared_tree,
    tree_in_batch,
)

from bicompile.lowering.attention import gpu as attention
from bicompile.lowering.attention.order import gpu_order_for as attention_order
from bicompile.lowering.reduction import gpu as reduction
from bicompile.lowering.reduction import gpu_statistics as statistics
from bicompile.lowering.scan import gpu as scan
from bicompile.lowering.scatter import gpu as scatter
from bicompile.lowering.softmax import gpu as softmax
from bicompile.testing.declared import gpu_attention_trees

OPS = SimpleNamespace(
    sum=lambda *args: reduction.reduce("sum", *args),
    sum_square=lambda *args: reduction.reduce("sum_square", *args),
    vector_norm=reduction.vector_norm,
    logsumexp=statistics.logsumexp,
    softmax=softmax.softmax,
    softmax_backward=softmax.softmax_backward,
    cumsum=scan.cumsum,
    index_add=scatter.index_add,
    sdpa=attention.sdpa,
)
# Few, with few summands: a call takes the interpreter a twentieth of a second.
SIGNED = [
    ("sum", REDUCTIONS, "sum"),
    ("sum over dim 0", REDUCTIONS, "sum"),
    ("log_softmax_backward", REDUCTIONS, "sum"),
]
SIGNED += [("cumsum", SCANS, "cumsum"), ("index_add", SCATTERS, "index_add")]


@pytest.mark.parametrize("name, sums, op", SIGNED, ids=[name for name, *_ in SIGNED])
def test_a_kernel_adds_as_its_order_says(name: str, sums: dict[str, Sum], op: str):
    found = tree_in_batch(lambda x: sums[name](OPS, x), 7, 2)
    assert_same_tree(declared_tree(op, 7, torch.float32, "cuda"), found, name)


@pytest.mark.parametrize("name", POSITIVE)
def test_of_three_positive_summands_those_two_meet_first_that_the_order_says(name: str):
    tree = declared_tree("sum", 1100, torch.float32, "cuda")
    check_triples(lambda x: POSITIVE[name](OPS, x), tree, (20,), "cpu", name, count=20)


@pytest.mark.parametrize("name", POSITIVE_ATTENTION)
def test_attentions_weights_are_added_as_its_order_says(name: str):
    tree = gpu_attention_trees(attention_order(1, torch.float32), 1, 550)["weights"]
    check_triples(lambda x: POSITIVE_ATTENTION[name](OPS, x), tree, (5,), "cpu", name, count=5)
