"""The backend end to end on small functions: bits, options, caches, training, refusals."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bicompile
from bicompile.testing import same_bits

pytestmark = pytest.mark.optimised


class Block(nn.Module):
    """Two products, a norm and a softmax: one of each thing that stock PyTorch varies."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(200, 64), nn.Linear(64, 32)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(F.silu(self.up(x)))).softmax(-1)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


def test_name_is_known_to_torch_compile():
    assert "batch_invariant" in torch._dynamo.list_backends()


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_keep_their_bits_alone_and_with_autograd(block, dynamic):
    compiled = torch.compile(block, backend="batch_invariant", dynamic=dynamic)
    x = torch.randn(5, 200)
    with torch.no_grad():
        whole = compiled(x)
        assert same_bits(compiled(x[2:3])[0], whole[2])
        assert same_bits(compiled(x.flip(0)).flip(0), whole)
    trained = x.clone().requires_grad_()
    y = compiled(trained)
    assert same_bits(y.detach(), whole)
    y.backward(torch.ones_like(y))
    alone = x[2:3].clone().requires_grad_()
    y = compiled(alone)
    y.backward(torch.ones_like(y))
    assert same_bits(alone.grad[0], trained.grad[2])
    torch.testing.assert_close(whole, block(x))


def test_reduce_overhead_and_default_modes_agree(block):
    x = torch.randn(3, 200)
    with torch.no_grad():
        default = torch.compile(block, backend="batch_invariant", mode="default")(x)
        torch._dynamo.reset()
        assert same_bits(torch.compile(block, backend="batch_invariant", mode="reduce-overhead")(x), default)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"options": {"alow": ["aten.sum"]}}, "allow"),
        ({"options": {"max_autotun": True}}, "max_autotune"),
        ({"options": {"max_autotune": True}}, "max_autotune"),
        ({"options": {"pattern_matcher": True}}, "fusion"),
        ({"options": {"on_refused": "shrug"}}, "on_refused"),
        ({"options": {"allow": "aten.sum"}}, "allow"),
        ({"mode": "max-autotune"}, "reduce-overhead"),
    ],
)
def test_wrong_options_are_refused_with_the_right_name(block, kwargs, message):
    with pytest.raises(bicompile.OptionError, match=message):
        torch.compile(block, backend="batch_invariant", **kwargs)(torch.randn(2, 200))


def test_harmless_inductor_settings_pass_through(block):
    with torch.no_grad():
        compiled = torch.compile(block, backend="batch_invariant", options={"size_asserts": False})
        assert same_bits(compiled(torch.ones(2, 200))[0], compiled(torch.ones(1, 200))[0])


def test_unknown_reduction_is_refused_with_op_and_line():
    def unknown(x):
        return torch.linalg.pinv(x)

    with pytest.raises(bicompile.UnsupportedOpError, match=r"(?s)linalg_pinv.*test_backend.py:\d+.*allow"):
        torch.compile(unknown, backend="batch_invariant")(torch.randn(4, 3, 3))


def test_allowed_op_runs_and_warn_warns():
    def unknown(x):
        return torch.linalg.pinv(x)

    x = torch.randn(4, 3, 3)
    allowed = torch.compile(unknown, backend="batch_invariant", options={"allow": ["aten.linalg_pinv"]})
    torch.testing.assert_close(allowed(x), unknown(x))
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="linalg_pinv"):
        torch.compile(unknown, backend="batch_invariant", options={"on_refused": "warn"})(x)


def test_random_numbers_are_refused():
    with pytest.raises(bicompile.UnsupportedOpError, match="random"):
        torch.compile(lambda x: x + torch.rand_like(x), backend="batch_invariant")(torch.randn(4))


def test_too_many_recompilations_raise_instead_of_running_eager(block):
    compiled = torch.compile(block, backend="batch_invariant", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad(), pytest.raises(Exception, match="ecompile"):
        for rows in range(1, 6):
            compiled(torch.randn(rows, 200))


def test_refusal_leaves_other_backends_alone():
    """Trap 24: an exception inside our compile must not leave our table or our codegen behind."""
    from torch._inductor import compile_fx

    stock = compile_fx.select_decomp_table
    with pytest.raises(bicompile.UnsupportedOpError, match="linalg_pinv"):
        torch.compile(lambda x: torch.linalg.pinv(x), backend="batch_invariant")(torch.randn(4, 3, 3))
    assert compile_fx.select_decomp_table is stock
    q = torch.randn(1, 2, 5, 8)
    stock_attention = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="aot_eager")
    assert same_bits(stock_attention(q), F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("training", [False, True])
def test_encoder_layer_has_the_same_bits_on_its_fused_path(training):
    """PyTorch replaces an encoder layer by one fused op where no gradient is wanted."""
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.0, batch_first=True).train(training)
    compiled = torch.compile(layer, backend="batch_invariant")
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        fused = compiled(x)
        assert same_bits(compiled(x[1:2])[0], fused[1])
    assert same_bits(compiled(x.clone().requires_grad_()).detach(), fused)
    torch.testing.assert_close(fused, layer(x), rtol=1e-4, atol=1e-5)


_PROCESS = """
import json, sys, torch, bicompile.config
from torch._dynamo.utils import counters

torch.manual_seed(0)
weight, number = torch.randn(96, 200), float(sys.argv[1])

def f(x):
    return (torch.nn.functional.silu(x @ weight.T) * number).softmax(-1)

def run(grad=False, options=None):
    torch._dynamo.reset()
    counters.clear()
    y = torch.compile(f, backend="batch_invariant", options=options or {})(torch.ones(3, 200, requires_grad=grad))
    if grad:
        y.sum().backward()
    return dict(
        fx=counters["inductor"]["fxgraph_cache_hit"],
        fx_miss=counters["inductor"]["fxgraph_cache_miss"],
        aot=counters["aot_autograd"]["autograd_cache_hit"],
        bits=y.detach().view(torch.int32).tolist(),
    )

found = {"without autograd": run(), "with autograd": run(grad=True), "options": run(options={"allow": ["aten.foo"]})}
bicompile.config._sources_hash = lambda: "another version"
found["sources"] = run()
print(json.dumps(found))
"""


def test_second_process_hits_both_caches_and_changed_options_or_sources_miss_them():
    """The AOTAutograd key knows neither decompositions nor backend: without our salt it would serve another's graph.

    A number of its own makes the graph one that no cache holds yet.
    """
    command = [sys.executable, "-c", _PROCESS, repr(1 + random.SystemRandom().random())]
    first, second = (json.loads(_output(command).splitlines()[-1]) for _ in range(2))
    for case, found in first.items():
        assert found["aot"] == 0 and found["fx_miss"] >= 1, case
    for case, found in second.items():
        assert found["aot"] == 1 and found["fx"] >= 1 and found["fx_miss"] == 0, case
        assert found["bits"] == first[case]["bits"] == first["without autograd"]["bits"], case


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_decorator_takes_functions_methods_classes_and_modules(block):
    x = torch.randn(4, 200)

    @bicompile.batch_invariant
    def project(x):
        return x @ x.T.new_ones(200, 8)

    @bicompile.batch_invariant(dynamic=True)
    class Wrapped(Block):
        pass

    class Holder:
        @bicompile.batch_invariant
        def apply(self, x):
            return x.sum(-1)

    with torch.no_grad():
        assert same_bits(project(x)[1:2], project(x[1:2]))
        module = Wrapped()
        assert same_bits(module(x)[1:2], module(x[1:2]))
        assert same_bits(Holder().apply(x)[1:2], Holder().apply(x[1:2]))
        wrapped = bicompile.batch_invariant(block)
        assert same_bits(wrapped(x)[1:2], wrapped(x[1:2]))
    with pytest.raises(TypeError, match="nn.Module"):
        bicompile.batch_invariant(int)
    with pytest.raises(TypeError, match="backend"):
        bicompile.batch_invariant(block, backend="inductor")
