"""Cross entropy of a linear layer in chunks: the bits of the two functions, without the scores of all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_reduction import DTYPES
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bicompile
from bicompile.lowering.matmul import reference
from bicompile.lowering.softmax import gpu_gradient
from bicompile.lowering.softmax import linear_cross_entropy as lowering
from bicompile.passes.fuse_linear_cross_entropy import fuse_linear_cross_entropy_pass
from bicompile.testing import same_bits

ops = torch.ops.bicompile
N, K, V = 205, 200, 901  # two blocks of a weight's sums, two of a score's and five of a hidden row's
FORMS: dict[str, dict[str, Any]] = {
    "mean": {},
    "of each row": {"reduction": "none"},
    "weighted": {"reduction": "sum", "weight": torch.linspace(0.2, 1.4, V), "ignore_index": 5},
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as small as they get."""
    monkeypatch.setattr(lowering, "CHUNK_BYTES", 1)


def layer_and_target(dtype: torch.dtype, num_rows: int = N) -> tuple[list[Tensor], Tensor]:
    """Hidden rows, weight and bias, and a target with a row that does not count."""
    g = torch.Generator().manual_seed(0)
    layer = [torch.randn(*shape, generator=g).to(dtype) for shape in ((num_rows, K), (V, K), (V,))]
    target = torch.randint(0, V, (num_rows,), generator=g)
    target[1], target[2] = -100, 5
    return layer, target


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def of_two(hidden: Tensor, matrix: Tensor, bias: Tensor, target: Tensor, **form: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden, matrix, bias).to(wide(hidden)), target, **form)


def of_one(hidden: Tensor, matrix: Tensor, bias: Tensor, target: Tensor, **form: Any) -> Tensor:
    return bicompile.linear_cross_entropy(hidden, matrix, target, linear_bias=bias, dtype=wide(hidden), **form)


def value_and_gradients(
    fn: Callable[..., Tensor], layer: list[Tensor], target: Tensor, **form: Any
) -> tuple[Tensor, ...]:
    layer = [t.detach().requires_grad_() for t in layer]
    loss = fn(*layer, target, **form)
    down = (torch.arange(loss.numel()) % 7 - 2).to(loss.dtype).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, layer, down)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_have_the_bits_of_the_two_functions(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lowering, "CHUNK_BYTES", 384 * N * dtype.itemsize)  # two blocks at a time: 2, 2, 1
    layer, target = layer_and_target(dtype)
    options = FORMS[form]
    target = target.where(target >= 0, 5) if "ignore_index" in options else target
    ours = value_and_gradients(of_one, layer, target, **options)
    with bicompile.eager():
        two = value_and_gradients(of_two, layer, target, **options)
    assert same_bits(ours, two)


def test_rows_keep_their_bits_and_so_do_all_results_where_chunks_are_larger(
    monkeypatch: pytest.MonkeyPatch, set_threads: Callable[[int], None]
):
    layer, target = layer_and_target(torch.bfloat16)
    layer[0][9] = torch.nan
    hidden, *params = layer
    loss, gradient, *others = value_and_gradients(of_one, layer, target, reduction="sum")
    each = of_one(*layer, target, reduction="none")
    for rows in ([4], [0, 7, 201], list(range(N - 1, -1, -1))):
        some = [hidden[rows], *params]
        assert same_bits(of_one(*some, target[rows], reduction="none"), each[rows])
        assert same_bits(value_and_gradients(of_one, some, target[rows], reduction="sum")[1][0], gradient[rows][0])
    monkeypatch.setattr(lowering, "CHUNK_BYTES", 1 << 30)
    monkeypatch.setattr(lowering, "CONTINUES", ())
    set_threads(1)
    assert same_bits(value_and_gradients(of_one, layer, target, reduction="sum"), (loss, gradient, *others))


class _Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("continues", [True, False], ids=["cpu", "as on a gpu"])
def test_scores_of_all_rows_never_exist(continues: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lowering, "CONTINUES", ("cpu",) if continues else ())
    (hidden, weight, bias), target = layer_and_target(torch.float32, 500)
    hidden, weight = hidden[:, :8].contiguous(), weight[:, :8].contiguous()
    classes = target.clamp(min=0)
    with _Largest() as largest:
        kept = lowering.linear_log_probability(hidden, weight, bias, classes)
        grad = torch.ones_like(kept[0])
        lowering.linear_log_probability_backward(grad, hidden, weight, bias, classes, *kept[1:], (True, True, True))
    assert 0 < largest.numel <= 192 * max(500, V) < 500 * V
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        of_one(hidden.requires_grad_(), weight, bias, target).backward()
    assert saved and max(t.numel() for t in saved) <= weight.numel()


def test_a_gpus_chunks_of_rows_give_the_same_bits_and_only_what_is_asked_for_is_computed(
    monkeypatch: pytest.MonkeyPatch,
):
    (hidden, weight, bias), target = layer_and_target(torch.bfloat16)
    classes = target.clamp(min=0)
    _, *statistics = ops.linear_log_probability(hidden, weight, bias, classes)
    given = (torch.arange(N) % 7 - 2.0, hidden, weight, bias, classes, *statistics)
    whole = ops.linear_log_probability_backward(*given, (True, True, True))
    monkeypatch.setattr(lowering, "CONTINUES", ())
    assert same_bits(ops.linear_log_probability_backward(*given, (True, True, True)), whole)
    for only in range(3):
        wanted = [i == only for i in range(3)]
        some = ops.linear_log_probability_backward(*given, wanted)
        assert same_bits(some[only], whole[only]) and [t.numel() > 0 for t in some] == wanted


def test_the_code_that_a_gpu_compiles_for_the_gradient_of_scores_has_the_kernels_bits():
    x = torch.randn(5, 77, generator=torch.Generator().manual_seed(0)).bfloat16()
    shift, log_total = ops.softmax_statistics(x, 1)
    index = torch.tensor([0, 76, 77, -1, 40])  # two are in another chunk
    given = (torch.tensor([1.0, 2.0, 0.3, 1e-3, -2.0]), x, index, shift, log_total)
    ours = ops.log_probability_backward(*given)
    assert same_bits(gpu_gradient.log_probability_backward(*given), ours)
    assert (ours[0] > 0).sum() == 1 and not (ours[2:4] > 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_in_pieces_has_the_bits_of_the_whole(dtype: torch.dtype):
    g = torch.Generator().manual_seed(0)
    a = (torch.randn(3, 400, generator=g, dtype=torch.float64) * 2.0 ** (torch.arange(400) % 9 - 5)).to(dtype)
    b = torch.randn(400, 5, generator=g, dtype=torch.float64).to(dtype)
    sums = None
    for ks in (slice(0, 192), slice(192, 384), slice(384, 400)):
        sums = ops.mm_continued(sums, a[:, ks], b[ks])
    assert same_bits(sums.to(dtype), reference.mm(a, b))
    with pytest.raises(RuntimeError, match="expected sums of"):
        ops.mm_continued(sums[:2], a, b)


def test_first_and_second_derivatives_are_right():
    g = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (6, 4), (6,))
    layer = [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]
    target = torch.tensor([3, -100, 5])

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bicompile.linear_cross_entropy(hidden, weight, target, linear_bias=bias)

    seed = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, layer)
    assert torch.autograd.gradgradcheck(loss, layer, grad_outputs=seed)
    with bicompile.eager():
        once = torch.autograd.grad(loss(*layer), layer)
        assert same_bits(torch.autograd.grad(loss(*layer), layer, create_graph=True), once)


def test_autocast_and_leading_dims_are_those_of_the_two_functions():
    layer, target = layer_and_target(torch.float32)
    hidden, target = layer[0].view(5, 41, K), target.view(5, 41)
    with torch.autocast("cpu", torch.bfloat16):
        ours = bicompile.linear_cross_entropy(hidden, layer[1], target, linear_bias=layer[2], reduction="none")
        with bicompile.eager():
            two = F.cross_entropy(F.linear(hidden, *layer[1:]).transpose(1, 2), target, reduction="none")
    assert ours.dtype == torch.float32 and same_bits(ours, two)


def test_wrong_arguments_are_refused():
    (hidden, weight, bias), target = layer_and_target(torch.float32)
    mistakes: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((hidden, weight[:, :3], target), {}, "do not fit"),
        ((hidden, weight.bfloat16(), target), {}, "one dtype"),
        ((hidden, weight[0], target), {}, r"expected \[N, K\] and \[V, K\]"),
        ((hidden, weight, target), {"linear_bias": bias[:3]}, "expected a bias"),
        ((hidden, weight, target), {"weight": bias[:3]}, "a weight for each class"),
        ((hidden, weight, target), {"reduction": "max"}, "none, mean or sum"),
        ((hidden, weight, target.int()), {}, "int64"),
        ((hidden, weight, torch.softmax(hidden @ weight.T, 1)), {}, r"call F\.cross_entropy"),
    ]
    for args, form, message in mistakes:
        with pytest.raises(ValueError, match=message):
            bicompile.linear_cross_entropy(*args, **form)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|out of range"):
        bicompile.linear_cross_entropy(hidden, weight, target + V)


def test_ops_pass_opcheck():
    hidden, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((3, 8), (9, 8), (9,)))
    index = torch.tensor([0, 8, 4])
    torch.library.opcheck(ops.linear_log_probability.default, (hidden, weight, bias, index))
    torch.library.opcheck(ops.linear_log_probability.default, (hidden, weight, None, index))
    hidden, weight, bias = (t.detach() for t in (hidden, weight, bias))
    _, *statistics = ops.linear_log_probability(hidden, weight, bias, index)
    for wanted in ((True, True, True), (False, True, False)):
        given = (torch.ones(3), hidden, weight, bias, index, *statistics, wanted)
        torch.library.opcheck(ops.linear_log_probability_backward.default, given)
    scores = ops.addmm(bias, hidden, weight.T, 1.0, 1.0)
    torch.library.opcheck(ops.log_probability_backward.default, (torch.ones(3), scores, index, *statistics))
    torch.library.opcheck(ops.mm_continued.default, (None, hidden, weight.T))


# Compiled code, which becomes the op by itself.


class Head(torch.nn.Module):
    """The end of a language model: what transformers computes as its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(K, V, dtype=torch.bfloat16)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        scores = self.layer(hidden).float()
        shifted = F.pad(target, (0, 1), value=-100)[..., 1:].contiguous()
        return F.cross_entropy(scores.view(-1, V), shifted.view(-1))


def test_compiled_code_becomes_the_op_with_the_bits_of_eager():
    torch.manual_seed(0)
    head = Head()
    layer, target = layer_and_target(torch.bfloat16)
    hidden, target = layer[0].view(5, 41, K), target.view(5, 41)
    wanted = [hidden.requires_grad_(), *head.parameters()]

    def run(fn: Any, rows: slice) -> tuple[Tensor, ...]:
        loss = fn(hidden[rows], target[rows])
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    compiled = torch.compile(head, backend="batch_invariant", dynamic=True)
    for rows in (slice(0, 5), slice(1, 4)):
        ours = run(compiled, rows)
        with bicompile.eager():
            assert same_bits(run(head, rows), ours)
    certificate = bicompile.explain(head, hidden, target)
    kinds = {node.op: (node.kind, node.order) for node in certificate.nodes if "linear" in node.op}
    assert certificate.ok and kinds.keys() == {
        "bicompile.linear_log_probability.default",
        "bicompile.linear_log_probability_backward.default",
    }
    assert kinds["bicompile.linear_log_probability.default"] == (
        "lowered",
        f"linear_log_probability over [{K}, {V}]",
    )
    assert kinds["bicompile.linear_log_probability_backward.default"][0] == "cross-batch"
    assert not any(node.op.startswith(("bicompile.mm", "bicompile.softmax")) for node in certificate.nodes)


def losses_of(fn: Callable[..., Any], *args: Any, **options: Any) -> list[str]:
    """What computes the losses in Dynamo's graphs of ``fn``, after the pass."""
    found = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        fuse_linear_cross_entropy_pass(gm)
        nodes = [node for module in gm.modules() if isinstance(module, GraphModule) for node in module.graph.nodes]
        found.extend(str(getattr(node.target, "__name__", node.target)) for node in nodes if node.op == "call_function")
        return gm.forward

    torch.compile(fn, backend=backend, **options)(*args)
    return [name for name in found if "cross_entropy" in name]


def small() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(6, 8, requires_grad=True), torch.randn(9, 8), torch.arange(6)


def autocast(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(F.linear(h, w), t)


def checkpointed(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda h: F.cross_entropy(F.linear(h, w), t), h, use_reentrant=False)


MATCHES: dict[str, Callable[..., Any]] = {
    "summed": lambda h, w, t: F.cross_entropy(F.linear(h, w), t, reduction="sum"),
    "module": lambda h, w, t: torch.nn.CrossEntropyLoss(weight=w[:, 0], ignore_index=2)(F.linear(h, w, w[:, 1]), t),
    "autocast": autocast,
    "checkpointed": checkpointed,
    "bicompile's own": lambda h, w, t: bicompile.linear_cross_entropy(h, w, t, linear_bias=w[:, 1]),
    "of sequences": lambda h, w, t: F.cross_entropy(F.linear(h.view(2, 3, 8), w).to(torch.float32).flatten(0, 1), t),
}
if hasattr(F, "linear_cross_entropy"):
    MATCHES["torch's own"] = lambda h, w, t: F.linear_cross_entropy(h, w, t)


@pytest.mark.parametrize("name", MATCHES)
def test_pass_finds_the_layer_and_its_loss(name: str):
    assert losses_of(MATCHES[name], *small(), dynamic=True, fullgraph=True) == ["linear_cross_entropy.default"]


def without_gradient(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        scores = F.linear(h, w)
    return F.cross_entropy(scores, t)


def overwritten(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    scores = F.linear(h, w)
    w.add_(1.0)
    return F.cross_entropy(scores, t)


def assigned(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    scores = F.linear(h, w)
    w[0] = 1.0
    return F.cross_entropy(scores, t)


def returned(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.linear(h, w)
    return F.cross_entropy(scores, t), scores


def returned_wide(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    scores = F.linear(h.bfloat16(), w.bfloat16()).float()
    return F.cross_entropy(scores, t), scores


def of_each_sample(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return torch.func.vmap(lambda x, y: F.cross_entropy(F.linear(x[None], w), y[None]))(h, t)


NEAR_MISSES: dict[str, Callable[..., Any]] = {
    "scores used elsewhere": returned,
    "converted scores used elsewhere": returned_wide,
    "capped scores": lambda h, w, t: F.cross_entropy(F.linear(h, w).tanh(), t),
    "part of the rows": lambda h, w, t: F.cross_entropy(F.linear(h, w)[1:], t[1:]),
    "part of the classes": lambda h, w, t: F.cross_entropy(F.linear(h, w)[:, :7], t),
    "classes moved": lambda h, w, t: F.cross_entropy(F.linear(h, w).view(9, 6), torch.arange(9) % 6),
    "smoothed labels": lambda h, w, t: F.cross_entropy(F.linear(h, w), t, label_smoothing=0.1),
    "probabilities": lambda h, w, t: F.cross_entropy(F.linear(h, w), torch.full((6, 9), 1 / 9)),
    "more dims": lambda h, w, t: F.cross_entropy(F.linear(h.view(2, 3, 8), w).transpose(1, 2), t.view(2, 3)),
    "rounded scores": lambda h, w, t: F.cross_entropy(F.linear(h, w).to(torch.bfloat16).float(), t),
    "layer without gradient": without_gradient,
    "weight written": overwritten,
    "weight assigned": assigned,
    "vmap": of_each_sample,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_pass_leaves_a_near_miss_alone(name: str):
    assert losses_of(NEAR_MISSES[name], *small()) == ["cross_entropy"]


def test_pass_leaves_scores_alone_that_fit_in_one_chunk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lowering, "CHUNK_BYTES", 6 * 9 * 4)
    assert losses_of(MATCHES["summed"], *small()) == ["cross_entropy"]


def test_pass_finds_the_loss_of_a_transformers_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    tokens = torch.arange(14).view(2, 7)
    only_loss = losses_of(lambda x: model(x, labels=x, use_cache=False).loss, tokens)
    assert only_loss == ["linear_cross_entropy.default"]


def test_chunks_end_between_the_blocks_of_a_product_and_leave_nothing_out(monkeypatch: pytest.MonkeyPatch):
    assert [(c.start, c.stop) for c in lowering.chunks(400, 10, 4)] == [(0, 192), (192, 384), (384, 400)]
    monkeypatch.setattr(lowering, "CHUNK_BYTES", 500 * 40)
    assert [(c.start, c.stop) for c in lowering.chunks(400, 10, 4)] == [(0, 384), (384, 400)]
    assert not list(lowering.chunks(0, 10, 4))
