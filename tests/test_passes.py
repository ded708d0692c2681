"""Each pass on small graphs: what it replaces, what it leaves alone, that a second run changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import bicompile
from bicompile.decompositions import decomposition_table
from bicompile.lowering.loading import LIBRARY_OF
from bicompile.passes import lower_matmuls, lower_reductions, lower_scans, lower_scatters, lower_softmax
from bicompile.passes.certify import Certification, _without_kernel, certify_pass
from bicompile.passes.pipeline import PIPELINE, Pipeline
from bicompile.testing import same_bits


def graph_of(fn, *inputs):
    """The functional ATen graph of ``fn``, as the pipeline receives it."""
    with torch.no_grad():
        return make_fx(torch.func.functionalize(fn), decomposition_table(), tracing_mode="fake")(*inputs)


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]


def own(gm):
    return [t.removeprefix("bicompile.").removesuffix(".default") for t in targets(gm) if t.startswith("bicompile.")]


def lowered(pass_, fn, *inputs):
    """Run one pass; check values, metadata and that it is idempotent; return our ops in the graph."""
    gm = graph_of(fn, *inputs)
    before = [node.meta["val"] for node in gm.graph.find_nodes(op="output")[0].all_input_nodes]
    assert pass_(gm).modified
    assert not pass_(gm).modified
    after = [node.meta["val"] for node in gm.graph.find_nodes(op="output")[0].all_input_nodes]
    assert [(v.shape, v.dtype, v.stride()) for v in before] == [(v.shape, v.dtype, v.stride()) for v in after]
    torch.testing.assert_close(gm(*inputs), fn(*inputs), rtol=1e-4, atol=1e-5)
    return own(gm)


X, Y, Z = torch.randn(4, 7, 6), torch.randn(4, 6, 5), torch.randn(6, 5)
C = torch.randn(5)


@pytest.mark.parametrize(
    ("fn", "inputs", "ops"),
    [
        (torch.mm, (X[0], Z), ["mm"]),
        (torch.bmm, (X, Y), ["bmm"]),
        (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), (C, X[0], Z), ["addmm"]),
        (lambda c, a, b: torch.baddbmm(c, a, b, beta=0, alpha=2), (C, X, Y), ["baddbmm"]),
        (F.linear, (X, Z.T.contiguous(), C), ["addmm"]),
        (torch.mv, (Z, C), ["mm"]),
        (torch.dot, (C, C), ["mm"]),
        (lambda c, a, b: torch.addbmm(c, a, b), (C, X, Y), ["addmm"]),
        (lambda a, b: torch.einsum("bij,bjk->bk", a, b), (X, Y), ["bmm", "mm"]),
        (torch.matmul, (X, Z), ["mm"]),
    ],
)
def test_every_product_becomes_one_of_four(fn, inputs, ops):
    found = lowered(lower_matmuls.lower_matmuls_pass, fn, *inputs)
    assert found and set(found) <= set(ops) | {"bmm", "mm", "addmm", "baddbmm"}
    assert found[0] in ops or found[-1] in ops


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (lambda x: x.sum(), "sum"),
        (lambda x: x.sum((0, -1), keepdim=True), "sum"),
        (lambda x: x.bfloat16().sum(1, dtype=torch.float32), "sum"),
        (lambda x: x.long().sum(1, dtype=torch.float32), "sum"),
        (lambda x: x.mean((1, 2)), "mean"),
        (lambda x: (x * x).mean(-1), "mean_square"),
        (lambda x: x.pow(2).sum(-1), "sum_square"),
        (lambda x: x.prod(1), "prod"),
        (lambda x: x.amax((0, 1)), "amax"),
        (lambda x: x.max(), "amax"),
        (lambda x: x.amin(-1, keepdim=True), "amin"),
        (lambda x: x.var(1, correction=0), "var"),
        (lambda x: x.std(), "var"),
        (lambda x: torch.var_mean(x, (1, 2), keepdim=True), "var"),
        (lambda x: torch.linalg.vector_norm(x, 3, (0, 2)), "vector_norm"),
        (lambda x: x.norm(dim=-1), "vector_norm"),
        (lambda x: x.logsumexp((1, 2)), "logsumexp"),
    ],
)
def test_every_reduction_is_lowered(fn, op):
    """Traps 4 and 23: several dims, keepdim, correction and dtype reach the op."""
    assert op in lowered(lower_reductions.lower_reductions_pass, fn, X)


def test_square_read_elsewhere_keeps_its_own_node():
    def fn(x):
        square = x * x
        return square.mean(-1), square

    gm = graph_of(fn, X)
    lower_reductions.lower_reductions_pass(gm)
    assert own(gm) == ["mean_square"] and "aten.mul.Tensor" in targets(gm)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_over_any_dim_is_lowered(dim):
    """Trap 29."""
    assert lowered(lower_softmax.lower_softmax_pass, lambda x: x.softmax(dim), X) == ["softmax"]
    assert lowered(lower_softmax.lower_softmax_pass, lambda x: x.log_softmax(dim), X) == ["softmax"]


def test_softmax_of_a_transposed_input_keeps_its_strides():
    assert lowered(lower_softmax.lower_softmax_pass, lambda x: x.transpose(0, 1).softmax(-1), X) == ["softmax"]


@pytest.mark.parametrize(
    ("op", "inputs", "fn"),
    [
        ("layer_norm", (X, Z[:, 0], Z[:, 1]), lambda x, w, b: F.layer_norm(x, (6,), w, b)),
        ("group_norm", (torch.randn(2, 6, 4, 4), Z[:, 0], Z[:, 1]), lambda x, w, b: F.group_norm(x, 3, w, b)),
    ],
)
def test_norms_and_those_gradients_that_are_wanted_are_ours(op, inputs, fn):
    x, weight, bias = inputs
    gm = graph_of(fn, *inputs)
    assert own(gm) == [op]
    torch.testing.assert_close(gm(*inputs), fn(*inputs), rtol=1e-4, atol=1e-5)

    def gradients(*wanted):
        def run(*leaves):
            leaves = [leaf.requires_grad_() for leaf in leaves]
            with torch.enable_grad():
                return torch.autograd.grad(fn(*leaves).sin().sum(), [leaves[i] for i in wanted])

        with torch.enable_grad():
            return own(
                make_fx(run, decomposition_table(), tracing_mode="fake")(x.clone(), weight.clone(), bias.clone())
            )

    assert gradients(0) == [op, f"{op}_backward"]
    assert gradients(1) == [op, f"{op}_backward_params"]
    assert gradients(0, 1, 2) == [op, f"{op}_backward", f"{op}_backward_params"]


@pytest.mark.parametrize("op", ["cumsum", "cumprod", "logcumsumexp"])
def test_scans_are_lowered(op):
    assert lowered(lower_scans.lower_scans_pass, lambda x: getattr(torch, op)(x, 1), X) == [op]


INDEX = torch.tensor([0, 2, 2, 1])


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (lambda x, i: torch.zeros(3, 7, 6).index_add(0, i, x, alpha=2), "index_add"),
        (lambda x, i: torch.zeros(4, 7, 6).scatter_add(1, i[:, None, None].expand(4, 7, 6), x), "scatter_add"),
        (lambda x, i: torch.zeros(3, 7, 6).index_put((i,), x, accumulate=True), "index_put_accumulate"),
        (
            lambda x, i: torch.zeros(4, 7, 6).scatter_reduce(1, i[:, None, None].expand(4, 7, 6), x, "amax"),
            "scatter_reduce",
        ),
    ],
)
def test_accumulating_scatters_are_lowered(fn, op):
    """Trap 17: no atomics."""
    assert lowered(lower_scatters.lower_scatters_pass, fn, X, INDEX) == [op]


@pytest.mark.parametrize(
    "fn",
    [
        lambda i: i.sum(1),
        lambda i: i @ i.T,
        lambda i: i.cumsum(0),
        lambda i: torch.zeros(3, 4, dtype=torch.long).index_add(0, i[0, :3] % 3, i[:3, :4]),
    ],
)
def test_integers_are_left_alone_and_exact(fn):
    gm = graph_of(fn, torch.randint(9, (5, 7)))
    assert not any(pass_(gm).modified for pass_ in PIPELINE)
    certification = Certification()
    certify_pass(gm, certification)
    assert {node.kind for node in certification.nodes} <= {"exact", "elementwise"}


def test_write_that_does_not_accumulate_is_left_alone():
    gm = graph_of(lambda x, i: torch.zeros(3, 7, 6).index_put((i[:3],), x[:3]), X, INDEX)
    assert not lower_scatters.lower_scatters_pass(gm).modified


def test_shared_users_all_see_the_new_node():
    def fn(a, b):
        y = a @ b
        return y + 1, y * 2

    gm = graph_of(fn, X[0], Z)
    lower_matmuls.lower_matmuls_pass(gm)
    assert own(gm) == ["mm"] and len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)) == 0


def test_certify_works_by_allowlist():
    """Trap 28 turned round: an op that no list names is refused, whatever it is called."""
    gm = graph_of(torch.ops.aten._fft_r2c.default, torch.randn(4, 8), [1], 0, True)
    certification = Certification(on_refused="collect")
    certify_pass(gm, certification)
    assert [node.kind for node in certification.nodes] == ["refused"]


def test_pipeline_reaches_every_pass_and_has_a_uuid():
    assert Pipeline(Certification(), "salt").uuid() == "salt"
    gm = graph_of(lambda x, y: F.layer_norm((x @ y).softmax(-1), (5,)).cumsum(-1).mean(), X, Y)
    Pipeline(Certification(), "salt")(gm.graph)
    assert set(own(gm)) == {"bmm", "softmax", "layer_norm", "cumsum", "mean"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.cumsum(1, dtype=torch.int32),
        lambda x: x.cumprod(0, dtype=torch.int64),
        lambda x: x.sum(1, dtype=torch.int64),
        lambda x: x.sum(dtype=torch.int32),
        lambda x: x.prod(1, dtype=torch.int32),
    ],
)
def test_sums_of_numbers_into_integers_are_exact(function):
    """Where transformers counts the tokens of its experts, for one."""
    x = torch.tensor([[1.7, -2.9, 3.5], [0.9, 0.9, 4.0]])
    expected = function(x)
    compiled = torch.compile(function, backend="batch_invariant")(x)
    with bicompile.eager():
        eager = function(x)
    assert same_bits(compiled, expected) and same_bits(eager, expected)
    assert compiled.dtype == eager.dtype == expected.dtype


def test_a_stub_is_no_kernel_for_a_gpu(monkeypatch):
    """Each op of ours runs on a GPU by a kernel of its own; the stub that loads CPU kernels does not count as one."""
    library = torch.library.Library("bicompile", "FRAGMENT")
    library.define("for_this_test(Tensor x) -> Tensor")
    library.impl("for_this_test", torch.clone, "CompositeExplicitAutograd")
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.bicompile.for_this_test.default, (graph.placeholder("x"),))
    with FakeTensorMode():
        node.meta["val"] = torch.empty(3, device="cuda")
    assert not _without_kernel(node)
    monkeypatch.setitem(LIBRARY_OF, "bicompile::for_this_test", "matmul")
    assert "no GPU kernel" in _without_kernel(node)
