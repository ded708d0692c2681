"""What passes and code generation do to graphs on a GPU: traced with fake tensors, so without one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch._inductor import lowering as inductor
from torch._inductor.codegen.triton import TritonPrinter
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy import functions as sympy_functions

from bicompile.decompositions import decomposition_table
from bicompile.errors import UnsupportedOpError
from bicompile.lowering.elementwise import codegen_gpu
from bicompile.lowering.gpu.admission import equal_bits
from bicompile.passes import certify
from bicompile.passes.certify import Certification, CertifiedNode, certify_pass
from bicompile.passes.pipeline import PIPELINE

aten = torch.ops.aten


def lowered(fn: Callable[..., Any], *shapes: tuple[int, ...], device: str = "cuda") -> GraphModule:
    """``fn`` of float32 tensors on ``device``, traced and put through the passes."""
    with FakeTensorMode():
        xs = [torch.empty(shape, device=device) for shape in shapes]
        gm = make_fx(fn, decomposition_table=decomposition_table())(*xs)
    for lower in PIPELINE:
        lower(gm)
    return gm


def classes(gm: GraphModule) -> dict[str, CertifiedNode]:
    """What certify says of each op of a graph."""
    certification = Certification(on_refused="collect")
    certify_pass(gm, certification)
    return {node.op: node for node in certification.nodes}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let certify believe that the GPU of the fake tensors is supported."""
    monkeypatch.setattr(certify, "_unsupported", lambda device: "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_with_what_to_do():
    refused = classes(lowered(lambda x: x + 1, (3, 4)))["aten.add.Tensor"]
    assert refused.kind == "refused" and "cuda:0" in refused.reason and "driver" in refused.reason


def test_an_op_without_a_gpu_kernel_is_refused_by_name(gpu, monkeypatch):
    library = torch.library.Library("bicompile", "FRAGMENT")
    library.define("only_on_cpu(Tensor x) -> Tensor")
    torch.library.register_fake("bicompile::only_on_cpu", torch.empty_like, lib=library)
    graph = lowered(lambda x: torch.ops.bicompile.only_on_cpu(x), (3, 4))
    refused = classes(graph)["bicompile.only_on_cpu.default"]
    assert refused.kind == "refused" and "bicompile.only_on_cpu" in refused.reason
    assert classes(lowered(torch.ops.bicompile.only_on_cpu, (3, 4), device="cpu"))[refused.op].kind == "lowered"


def test_topk_on_a_gpu_is_lowered_and_on_the_cpu_left_alone(gpu):
    def best(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(x, 2, largest=False)

    assert classes(lowered(best, (3, 4)))["bicompile.topk.default"].kind == "lowered"
    assert classes(lowered(best, (3, 4), device="cpu"))["aten.topk.default"].kind == "exact"


@pytest.mark.parametrize("stable", [None, False, True])
def test_sorting_becomes_stable(gpu, stable):
    gm = lowered(lambda x: torch.sort(x, stable=stable, dim=0), (3, 4))
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.sort.stable)
    assert node.kwargs["stable"] is True
    assert classes(gm)["aten.sort.stable"].kind == "exact"


@pytest.mark.parametrize("name", ["kthvalue", "median", "nanmedian", "mode"])
def test_ops_that_name_any_of_equal_elements_are_refused_on_a_gpu(gpu, name):
    arguments = (2,) if name == "kthvalue" else (0,)
    found = classes(lowered(lambda x: getattr(torch, name)(x, *arguments), (3, 4)))
    refused = next(node for node in found.values() if name in node.op)
    assert refused.kind == "refused"


def test_the_median_value_alone_has_no_ties(gpu):
    assert classes(lowered(torch.median, (3, 4)))["aten.median.default"].kind == "exact"


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.uint8, torch.int64],
    ids=str,
)
@pytest.mark.parametrize("largest", [True, False])
def test_topk_takes_the_first_of_equal_elements(dtype, largest):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 7, (40, 300), generator=generator).to(dtype)
    if dtype.is_floating_point:
        x -= 3
        x[:, 1] = -0.0
        x[5, 7:9] = float("nan")
        x[6, 9], x[7, 9] = float("inf"), -float("inf")
    wanted = torch.sort(x, dim=1, descending=largest, stable=True)
    values, indices = torch.ops.bicompile.topk(x, 9, 1, largest)
    assert torch.equal(indices, wanted.indices[:, :9])
    assert equal_bits(values, wanted.values[:, :9])
    values, indices = torch.ops.bicompile.topk(x.T, 9, 0, largest)
    assert torch.equal(indices, wanted.indices[:, :9].T)
    assert equal_bits(values, wanted.values[:, :9].T)


def test_topk_of_nothing_and_of_a_number():
    topk = torch.ops.bicompile.topk
    assert topk(torch.empty(0, 4), 2, 1, True)[1].shape == (0, 2)
    assert topk(torch.empty(3, 4), 0, 1, True)[1].shape == (3, 0)
    assert topk(torch.tensor(2.0), 1, 0, True)[0].item() == 2.0
    torch.library.opcheck(topk.default, (torch.randn(3, 5), 2, 1, True))


def test_a_divisor_is_unknown_to_inductor_only_while_pinned():
    """Else ``x / 3`` would be a product where shapes are static and a quotient where they are symbols."""
    stock = inductor.get_constant_value
    with codegen_gpu.pinned_gpu_codegen():
        assert inductor.get_constant_value(object()) is None  # type: ignore[arg-type]
        with codegen_gpu.pinned_gpu_codegen():
            pass
        assert inductor.get_constant_value is not stock
    assert inductor.get_constant_value is stock


def test_the_device_library_is_tritons_own_unless_the_user_names_one(monkeypatch, tmp_path):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setattr(knobs.nvidia, "libdevice_path", "/usr/local/cuda/nvvm/libdevice/libdevice.10.bc")
    monkeypatch.delenv(codegen_gpu.LIBDEVICE, raising=False)
    codegen_gpu.pin_libdevice()
    own = codegen_gpu.signature()
    assert os.path.isfile(os.environ[codegen_gpu.LIBDEVICE]) and "triton" in knobs.nvidia.libdevice_path
    theirs = tmp_path / "libdevice.bc"
    theirs.write_bytes(b"another")
    monkeypatch.setenv(codegen_gpu.LIBDEVICE, str(theirs))
    codegen_gpu.pin_libdevice()
    assert knobs.nvidia.libdevice_path == str(theirs)
    assert codegen_gpu.signature() != own


def test_numbers_made_of_symbolic_sizes_are_computed_in_float64():
    """A static shape makes them Python's numbers; the kernel must not round them to float32 on the way."""
    size = sympy.Symbol("s0", integer=True, positive=True)
    with codegen_gpu.pinned_gpu_codegen():
        one_by_size = TritonPrinter().doprint(sympy_functions.IntTrueDiv(sympy.Integer(1), size))
        root = TritonPrinter().doprint(sympy_functions.OpaqueUnaryFn_sqrt(size))
        with pytest.raises(UnsupportedOpError, match="log.*dynamic=False"):
            TritonPrinter().doprint(sympy_functions.OpaqueUnaryFn_log(size))
    assert one_by_size == "(tl.full([], 1.0, tl.float64) / (s0).to(tl.float64))"
    assert root == "libdevice.sqrt((s0).to(tl.float64))"


@pytest.mark.parametrize("name", ["max", "min"])
def test_an_extremum_over_a_dim_is_the_first_of_equal_elements(name):
    """0.0 equals -0.0: which of the two comes out must not follow how the row was cut."""
    x = torch.tensor([[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0], [1.0, float("nan"), float("nan"), -2.0]])
    for keepdim in (False, True):
        extremum = functools.partial(getattr(torch, name), dim=1, keepdim=keepdim)
        values, indices = torch.compile(extremum, backend="batch_invariant")(x)
        assert indices.flatten().tolist() == [0, 0, 1]
        assert equal_bits(values.flatten()[:2], torch.tensor([0.0, -0.0])) and values.flatten()[2].isnan()
        assert values.dim() == (2 if keepdim else 1)
    found = classes(lowered(lambda x: getattr(x, name)(1), (3, 4), device="cpu"))
    assert f"aten.arg{name}.default" in found and f"aten.{name}.dim" not in found
