"""``bicompile.eager()``: the same lowerings without a compiler."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import bicompile
from bicompile.eager_mode import _is_composite, _LoweringMode
from bicompile.errors import UnsupportedOpError
from bicompile.lowering.elementwise.gpu import compiled
from bicompile.testing import same_bits

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(64), nn.RMSNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.up, self.down = nn.Linear(64, 200), nn.Linear(200, 64)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.rms(x)))) + F.softplus(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_rows_keep_their_bits_and_equal_the_compiled_ones(dtype):
    torch.manual_seed(0)
    block, x = Block().to(dtype).eval(), torch.randn(4, 5, 64).to(dtype)
    with torch.no_grad(), bicompile.eager():
        whole = block(x)
        assert same_bits(block(x[2:3])[0], whole[2])
        assert same_bits(block(x.flip(0)).flip(0), whole)
    with torch.no_grad():
        assert same_bits(torch.compile(block, backend="batch_invariant")(x), whole)


def test_gradients_inside_the_context_are_covered():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(4, 5, 64)
    with bicompile.eager():
        whole = x.clone().requires_grad_()
        block(whole).backward(torch.ones_like(x))
        alone = x[1:2].clone().requires_grad_()
        block(alone).backward(torch.ones_like(alone))
    assert same_bits(alone.grad[0], whole.grad[1])


def _images(x):
    """Rows [4, 6, 16] as images in the layout that convolutions like."""
    return x.unflatten(-1, (4, 4)).contiguous(memory_format=torch.channels_last)


POSITIVE = torch.linspace(0.5, 2, 16)
# Functions of rows [4, 6, 16] and weights [16] with gradients that are rounded on the way.
DIFFERENTIABLE = {
    "layer_norm": lambda x, w: F.layer_norm(x, (16,), w, w),
    "plain layer_norm": lambda x, w: F.layer_norm(x, (6, 16)),
    "group_norm": lambda x, w: F.group_norm(x, 2, w[:6], w[:6]),
    "group_norm of channels_last": lambda x, w: F.group_norm(_images(x), 3, w[:6]).permute(0, 2, 3, 1).reshape(4, -1),
    "instance_norm": lambda x, w: F.instance_norm(x, weight=w[:6]),
    "batch_norm": lambda x, w: F.batch_norm(x.mT, w.detach(), POSITIVE.to(w), w, w),
    "batch_norm in training": lambda x, w: F.batch_norm(x.mT, None, None, w, w, training=True),
    "softmax": lambda x, w: x.softmax(-1),
    "log_softmax": lambda x, w: x.log_softmax(1),
    "cross_entropy": lambda x, w: F.cross_entropy(x[0], torch.arange(6)),
    "silu": lambda x, w: F.silu(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_compiled_code(dtype):
    """Of norms and what else is not in the models of tests/test_models.py, which compares the gradients of those."""
    leaves = [(torch.randn(4, 6, 16), torch.randn(16)) for _ in DIFFERENTIABLE]

    def run(*leaves):
        return [fn(x, w) for fn, (x, w) in zip(DIFFERENTIABLE.values(), leaves, strict=True)]

    def results(run):
        inputs = [tuple(leaf.to(dtype, copy=True).requires_grad_() for leaf in pair) for pair in leaves]
        outputs = run(*inputs)
        torch.autograd.backward(outputs, [y.detach().abs() for y in outputs])
        gradients = ([leaf.grad for leaf in pair if leaf.grad is not None] for pair in inputs)
        return [[y.detach(), *grads] for y, grads in zip(outputs, gradients, strict=True)]

    compiled = results(torch.compile(run, backend="batch_invariant"))
    with bicompile.eager():
        expected = results(run)
    differing = [name for name, a, b in zip(DIFFERENTIABLE, compiled, expected, strict=True) if not same_bits(a, b)]
    assert not differing


def test_in_place_and_out_forms_are_covered():
    x = torch.randn(3, 200)
    with bicompile.eager():
        out = torch.empty(3)
        torch.sum(x, -1, out=out)
        assert same_bits(out, x.sum(-1))
        y = x.clone().exp_()
        assert same_bits(y, x.exp())
        z = torch.zeros(3, 4).addmm_(x, torch.ones(200, 4))
        assert same_bits(z, x @ torch.ones(200, 4))


def test_in_place_views_change_the_tensor_itself():
    x = torch.randn(3, 5)
    y = x.clone()
    with bicompile.eager():
        assert y.t_().unsqueeze_(0).shape == (1, 5, 3)
        assert same_bits(y[0], x.t())
        assert same_bits(x.quantile(0.5, dim=1), x.median(1).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_trains_with_the_bits_of_compiled_code(dtype):
    """Its result, its gradients and its running statistics."""
    torch.manual_seed(0)
    batches = [torch.randn(n, 5, 7, 3).to(dtype) for n in (9, 4)]

    def trained(norm: nn.Module, call: nn.Module) -> list[torch.Tensor]:
        found = []
        for x in batches:
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            found += [y.detach(), *torch.autograd.grad(y, [leaf, *norm.parameters()], x.flip(0))]
        return [*found, *norm.buffers()]

    norm = nn.BatchNorm2d(5).to(dtype)
    with bicompile.eager():
        expected = trained(norm, norm)
    norm = nn.BatchNorm2d(5).to(dtype)
    assert same_bits(trained(norm, torch.compile(norm, backend="batch_invariant", fullgraph=True)), expected)


IMAGES, ROWS, SQUARE = torch.randn(2, 4, 9, 9), torch.randn(3, 5, 16), torch.randn(16, 16)
COMPOSITES = {
    "attention": lambda: F.scaled_dot_product_attention(ROWS[:, None], ROWS[:, None], ROWS[:, None]),
    "batch_norm": lambda: F.batch_norm(ROWS, ROWS[0, :, 0], ROWS[1, :, 0].abs()),
    "conv2d": lambda: F.conv2d(IMAGES, IMAGES[:, :, :3, :3]),
    "cosine_similarity": lambda: F.cosine_similarity(ROWS, ROWS.flip(0)),
    "cross_entropy": lambda: F.cross_entropy(ROWS[0], torch.arange(5)),
    "einsum": lambda: torch.einsum("bij,jk->bik", ROWS, SQUARE),
    "instance_norm": lambda: F.instance_norm(IMAGES),
    "linear": lambda: F.linear(ROWS, SQUARE, SQUARE[0]),
    "matmul": lambda: ROWS @ SQUARE,
    "rms_norm": lambda: F.rms_norm(ROWS, (16,), SQUARE[0]),
    "std": lambda: ROWS.std(-1),
    "var": lambda: ROWS.var(1),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_inference_mode_gives_the_bits_of_no_grad(name):
    """There is no autograd there to take composite ops apart."""
    with torch.no_grad(), bicompile.eager():
        expected = COMPOSITES[name]()
    with torch.inference_mode(), bicompile.eager():
        assert same_bits(COMPOSITES[name](), expected)


def test_op_with_a_kernel_of_its_own_stays_whole_in_inference_mode():
    """As it does under autograd, though PyTorch could take it apart."""
    assert _is_composite(aten.rms_norm.default, on_gpu=False)
    assert not _is_composite(aten.native_channel_shuffle.default, on_gpu=False)


def test_parts_that_pytorch_takes_an_op_into_are_known():
    x, weight = torch.randn(3, 5), torch.rand(5)
    with bicompile.eager():
        assert same_bits(torch.frexp(x), x.frexp())
        assert torch.equal(x.masked_select(x > 0), x[x > 0])
        torch.testing.assert_close(torch.lerp(x, x[:1], weight), x + weight * (x[:1] - x))
        with pytest.raises(bicompile.UnsupportedOpError, match="aten.bernoulli"):
            torch.empty_like(x).bernoulli_()  # an in-place op with a default that its functional form lacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (5, 64), (2, 5, 64), (2, 0, 3, 64)], ids=str)
def test_linear_layer_is_one_op_with_the_bits_of_its_parts(shape, bias, dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48, bias=bias).to(dtype), torch.randn(*shape, 2, dtype=dtype)[..., 0]
    seen, wholes, dispatch = set(), [], _LoweringMode.__torch_dispatch__

    def watch(self, func, *rest):
        seen.add(func)
        return dispatch(self, func, *rest)

    with bicompile.eager():
        parts = layer(x).detach()  # weights that are learnt: in autograd's parts
        with mock.patch.object(_LoweringMode, "__torch_dispatch__", watch):
            for context in (torch.no_grad(), torch.inference_mode()):
                with context:
                    wholes.append(layer(x))
    assert all(same_bits(whole, parts) for whole in wholes)
    assert seen <= {aten.linear.default}  # which inference mode does not take apart before
    assert parts.shape == (*shape[:-1], 48)


def test_linear_layer_in_parts_for_transforms_and_other_modes():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 64), torch.randn(48, 64)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with bicompile.eager():
        whole = F.linear(x, weight)
        assert same_bits(torch.func.vmap(lambda rows: F.linear(rows, weight))(x), whole)
        with Watch():
            assert same_bits(F.linear(x, weight), whole)
    assert aten.mm.default in seen


def test_derivatives_go_forward_through_a_linear_layer():
    torch.manual_seed(0)
    x, tangent, weight = torch.randn(3, 64), torch.randn(3, 64), torch.randn(48, 64)
    with bicompile.eager():
        expected = F.linear(tangent, weight)
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(F.linear(forward_ad.make_dual(x, tangent), weight))
        transformed = torch.func.jvp(lambda x: F.linear(x, weight), (x,), (tangent,))[1]
        assert same_bits(y.primal, F.linear(x, weight))
    assert same_bits(y.tangent, expected) and same_bits(transformed, expected)


@pytest.mark.parametrize(
    "arguments",
    [(torch.ones(2, 3), torch.ones(4, 5)), (torch.ones(2, 3), torch.ones(4, 3).double())],
    ids=["sizes", "dtypes"],
)
def test_linear_layer_that_pytorch_refuses_is_refused(arguments):
    with pytest.raises(RuntimeError) as stock:
        F.linear(*arguments)
    with bicompile.eager(), pytest.raises(type(stock.value)):
        F.linear(*arguments)


def test_unproven_op_is_refused_unless_allowed():
    x = torch.randn(4, 3, 3)
    with bicompile.eager(), pytest.raises(bicompile.UnsupportedOpError, match="linalg_pinv"):
        torch.linalg.pinv(x)
    with bicompile.eager(allow=["aten.linalg_pinv"]):
        torch.linalg.pinv(x)
    with bicompile.eager(on_refused="warn"), pytest.warns(UserWarning, match="linalg_pinv"):
        torch.linalg.pinv(x)


def test_everything_is_restored_after_an_exception_and_nesting():
    """Trap 24."""
    x = torch.randn(5, 300)
    stock = torch.logsumexp(x, -1)
    with pytest.raises(ZeroDivisionError), bicompile.eager(), bicompile.eager():
        1 / 0  # noqa: B018
    assert same_bits(torch.logsumexp(x, -1), stock)
    torch.linalg.pinv(torch.eye(3))  # refused inside, fine outside
    with bicompile.eager():
        with bicompile.eager():
            inner = x.softmax(-1)
        assert same_bits(x.softmax(-1), inner)


def test_other_threads_are_not_touched():
    outcome = []

    def work():
        torch.linalg.pinv(torch.eye(3))  # would be refused under the context
        outcome.append(True)

    with bicompile.eager():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert outcome == [True]


def test_op_that_is_compiled_by_itself_is_the_op():
    """How eager code gets its elementwise functions on a GPU, shown on the CPU."""
    x, generator = torch.randn(6, 7), torch.Generator().manual_seed(0)
    weight = torch.randn(7, generator=generator)
    for operands in ((x, x, weight), (x.t(), x.t(), x.t()), (x[:, ::2], x[:1, 1:5], x[0, 0]), (x[:0], x[:0], weight)):
        result = compiled(aten.addcmul.default, operands, {"value": 0.3})
        expected = aten.addcmul.default(*operands, value=0.3)
        torch.testing.assert_close(result, expected)
        assert result.dtype == expected.dtype
    half = x.bfloat16()
    assert compiled(aten.mul.Tensor, (half, weight[0]), {}).dtype == torch.bfloat16
    assert compiled(aten.mul.Tensor, (half, 3), {}).dtype == torch.bfloat16
    assert compiled(aten.exp.default, (x.t(),), {}).stride() == x.t().stride()
    # A number stays one: as an unknown, 2 would make a power of the square.
    assert same_bits(compiled(aten.pow.Tensor_Scalar, (x, 2), {}), x * x)
    mantissa, exponent = compiled(aten.frexp.Tensor, (x,), {})
    assert same_bits(torch.ldexp(mantissa, exponent), x)


def test_op_that_cannot_be_compiled_by_itself_does_not_run_as_it_is():
    x = torch.randn(6)
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="compiling is switched off"):
        compiled(aten.sin.default, (x,), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_glu_has_the_bits_of_compiled_code(dtype):
    x = torch.randn(5, 8, 3).to(dtype)
    with bicompile.eager():
        ours = F.glu(x, 1)
    torch.testing.assert_close(ours, F.glu(x, 1))
    assert same_bits(torch.compile(lambda x: F.glu(x, 1), backend="batch_invariant", fullgraph=True)(x), ours)


def test_code_is_compiled_inside_the_context_too():
    """With what lies between two graphs covered; Dynamo would leave all of it uncompiled beneath another mode."""

    def scores(x):
        y = F.gelu(x @ x.mT)
        torch._dynamo.graph_break()
        return F.softmax(y.sum(-1) * torch.sigmoid(x).mean(), -1)

    x, counters = torch.randn(4, 300, 5), torch._dynamo.utils.counters
    counters.clear()
    with bicompile.eager():
        ours = scores(x)
        assert same_bits(torch.compile(scores, backend="batch_invariant")(x), ours)
        assert counters["stats"]["unique_graphs"] == 2


def test_one_random_number_for_the_whole_call_is_not_refused():
    """Layer drop draws one for each layer, in evaluation too, where it is not looked at."""

    def drops(x):
        return x * (torch.rand([]) < 2)

    x = torch.randn(3, 5)
    with bicompile.eager():
        assert same_bits(drops(x), x)
        with pytest.raises(UnsupportedOpError, match="aten.rand.default"):
            torch.rand(3)
    assert same_bits(torch.compile(drops, backend="batch_invariant", fullgraph=True)(x), x)


def test_batches_are_loaded_and_profiled_inside_the_context():
    rows = torch.randn(4, 5)
    with bicompile.eager():
        with torch.profiler.record_function("loading"):
            (first, _), (second, _) = DataLoader(TensorDataset(rows, rows), batch_size=2)
        with pytest.raises(UnsupportedOpError, match="aten.random"):
            torch.empty(3, dtype=torch.int64).random_()
    assert same_bits(torch.cat([first, second]), rows)
