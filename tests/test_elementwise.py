"""Elementwise functions: the same bits in vector and scalar code, compiled and eager, and close to the truth."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.codegen import cpp
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

import bicompile
from bicompile.errors import UnsupportedOpError
from bicompile.lowering import native
from bicompile.lowering.elementwise import codegen_cpu
from bicompile.lowering.elementwise.codegen_cpu import (
    CONTRACT_FLAG,
    materialise_headers,
    pinned_cpu_codegen,
    signature,
)
from bicompile.lowering.elementwise.op import PINNED_BINARY, PINNED_UNARY
from bicompile.testing import same_bits

pytestmark = pytest.mark.optimised

_SETTINGS = {
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "pattern_matcher": False,
    "joint_graph_constant_folding": False,
    "fallback_random": True,
    "fx_graph_cache": False,  # whose key would have to be salted, see signature()
}
_OURS = "exp exp2 expm1 log log2 log10 log1p sigmoid tanh erf sin cos rsqrt sqrt".split()
_LIBM = sorted(set(PINNED_UNARY.values()) - set(_OURS))
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_SPECIAL = (
    math.inf,
    -math.inf,
    math.nan,
    *map(float, "0 -0 1e-42 -1e-42 3e38 88.5 -88.5 -104 1 -1 .5 2 2e5 1e7".split()),
)


def _inductor(*, pinned: bool = True, **settings: Any) -> Callable[..., Any]:
    """Stock Inductor as a backend, with or without our functions."""

    def inner(gm: Any, inputs: Any, **options: Any) -> Any:
        if not pinned:
            return compile_fx_inner(gm, inputs, **options)
        with pinned_cpu_codegen(), inductor_config.patch("cpp.enable_floating_point_contract_flag", CONTRACT_FLAG):
            return compile_fx_inner(gm, inputs, **options)

    return lambda gm, inputs: compile_fx(gm, inputs, inner_compile=inner, config_patches={**_SETTINGS, **settings})


def _compiled(fn: Callable[..., Any], backend: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(lambda *args: fn(*args), backend=backend, dynamic=dynamic)


def _in_vector_and_scalar_code(fn: Callable[..., list[Tensor]], *args: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    metrics.reset()
    vector = _compiled(fn, _inductor())(*args)
    assert metrics.generated_cpp_vec_kernel_count > 0
    return vector, _compiled(fn, _inductor(**{"cpp.simdlen": 1}))(*args)


def _torch_function(name: str) -> Callable[[Tensor], Tensor]:
    return next(op for op, known in PINNED_UNARY.items() if known == name)


def _each_of(names: Sequence[str]) -> Callable[..., list[list[Tensor]]]:
    return lambda *xs: [[_torch_function(name)(x) for name in names] for x in xs]


def _unary(x: Tensor, name: str) -> Tensor:
    return torch.ops.bicompile.unary(x, name)


def _data(dtype: torch.dtype, count: int = 1000) -> Tensor:
    """Numbers over many binades, special values among them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, dtype=torch.float64, generator=generator)
    x = x * torch.exp2(torch.randint(-20, 7, (count,), generator=generator).double())
    x[: len(_SPECIAL)] = torch.tensor(_SPECIAL, dtype=torch.float64)
    return x[torch.randperm(count, generator=generator)].to(dtype)


def _assert_as_in_eager(names: Sequence[str], xs: Sequence[Tensor], results: Sequence[Sequence[Tensor]]) -> None:
    for x, outputs in zip(xs, results, strict=True):
        for name, output in zip(names, outputs, strict=True):
            assert same_bits(output, _unary(x, name)), f"{name} of {tuple(x.shape)}, {x.dtype}"


# --- compiled code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_our_functions_have_one_set_of_bits_at_every_static_size(dtype: torch.dtype) -> None:
    x = _data(dtype)
    sizes = (1, 2, 15, 16, 17, 31) if dtype == torch.float32 else (1, 17)
    xs = [x[5 : 5 + n] for n in sizes] + [x]
    results = _compiled(_each_of(_OURS), _inductor())(*xs)
    _assert_as_in_eager(_OURS, xs, results)
    for name in _OURS:
        whole = _unary(x, name)
        assert all(same_bits(_unary(part, name), whole[5 : 5 + len(part)]) for part in xs[:-1]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_of_libm_have_one_set_of_bits_at_every_static_size(dtype: torch.dtype) -> None:
    x = _data(dtype)
    xs = [x[5:6], x[5:22], x]
    _assert_as_in_eager(_LIBM, xs, _compiled(_each_of(_LIBM), _inductor())(*xs))


def test_dynamic_shapes_have_the_bits_of_static_ones() -> None:
    x = _data(torch.float32)
    compiled = _compiled(_each_of(_OURS), _inductor(), dynamic=True)
    for n in (1000, 2, 15, 16, 17, 31, 40):
        _assert_as_in_eager(_OURS, [x[5 : 5 + n]], compiled(x[5 : 5 + n]))


def _chain(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate = torch.sigmoid(x) * y
    return gate, torch.exp(-gate.abs()) + x, torch.tanh(gate) * torch.log1p(y.abs())


def _chain_op_by_op(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate = _unary(x, "sigmoid") * y
    return gate, _unary(-gate.abs(), "exp") + x, _unary(gate, "tanh") * _unary(y.abs(), "log1p")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fusion_and_layout_do_not_show(dtype: torch.dtype) -> None:
    x = torch.randn(37, 50).to(dtype)
    y = torch.randn(37, 50).to(dtype)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[:, ::3],
        lambda t: t[3:4, 7:8],
        lambda t: t[:, :1],
    ]
    pairs = [(view(x), view(y).contiguous()) for view in layouts]
    fused = _compiled(lambda *ps: [_chain(*p) for p in ps], _inductor())(*pairs)
    for pair, result in zip(pairs, fused, strict=True):
        assert same_bits(result, _chain_op_by_op(*pair))


def test_stock_inductor_gives_one_element_other_bits() -> None:
    x = _data(torch.float32)
    fns = [torch.exp, torch.tanh, torch.sigmoid]
    x = x[x.isfinite()][:400]
    whole = _compiled(lambda t: [f(t) for f in fns], _inductor(pinned=False))(x)
    scalar = _compiled(lambda t: [f(t) for f in fns], _inductor(pinned=False, **{"cpp.simdlen": 1}))(x)
    assert not any(same_bits(a, b) for a, b in zip(whole, scalar, strict=True))


def test_compositions_agree_in_vector_and_scalar_code() -> None:
    fns: list[Callable[[Tensor], Tensor]] = [
        F.silu,
        F.gelu,
        lambda t: F.gelu(t, approximate="tanh"),
        F.softplus,
        F.mish,
        F.elu,
        F.logsigmoid,
        torch.logit,
        torch.erfinv,
        torch.digamma,
        torch.special.i0,
        torch.special.ndtri,
        lambda t: torch.polygamma(1, t.abs() + 0.2),
        lambda t: torch.pow(t.abs(), 1.7),
        lambda t: torch.pow(1.3, t),
        lambda t: torch.atan2(t, t + 1),
        lambda t: torch.logaddexp(t, t + 1),
        lambda t: torch.special.gammainc(t.abs() + 0.1, t.abs()),
    ]
    x = torch.cat([torch.randn(300) * 3, torch.randn(97) * 0.05])
    vector, scalar = _in_vector_and_scalar_code(lambda t: [f(t) for f in fns], x)
    assert [i for i in range(len(fns)) if not same_bits(vector[i], scalar[i])] == []


_EXACT_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in "abs neg sqrt reciprocal floor ceil trunc round frac sign signbit isnan isinf relu".split()
    },
    "clamp": lambda t: t.clamp(-1, 1),
    "cube": lambda t: t**3,
    "divide by a number": lambda t: t / 3.0,
    "multiply, then add": lambda t: t * 0.1 + 0.3,
    "round to bfloat16": lambda t: t.bfloat16(),
    "round to float16": lambda t: t.half(),
    "round to bfloat16 and back": lambda t: t.bfloat16().float(),
    "where": lambda t: torch.where(t > 0, t, -t),
    "hardswish": F.hardswish,
    "silu": F.silu,
    **{f"to {d}": (lambda t, d=d: t.to(d)) for d in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.float64)},
}
_EXACT_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in (
            "add mul sub div maximum minimum copysign fmod remainder eq ne lt ge nextafter floor_divide".split()
        )
    },
    "masked fill": lambda a, b: a.masked_fill(b > 0, -math.inf),
}


def test_exact_operations_agree_in_vector_and_scalar_code_on_special_values() -> None:
    values = [v for x in (*_SPECIAL, 1.5, 2.5, 0.3, 127.0, 256.0, 65520.0, 2.0**31, 1e19, 1e-8, 1 / 3) for v in (x, -x)]
    s = torch.tensor(values)
    s = torch.cat([s, torch.tensor([0x7FC00001, -1, 0xFFC00000 - 2**32], dtype=torch.int32).view(torch.float32)])
    a, b = s.repeat_interleave(len(s)), s.repeat(len(s))

    def every(t: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        return [f(t) for f in _EXACT_UNARY.values()] + [f(a, b) for f in _EXACT_BINARY.values()]

    vector, scalar = _in_vector_and_scalar_code(every, s, a, b)
    names = [*_EXACT_UNARY, *_EXACT_BINARY]
    assert [n for n, v, w in zip(names, vector, scalar, strict=True) if not same_bits(v, w)] == []


# --- eager code -------------------------------------------------------------------------------------------------------


def _ulps(name: str, x: Tensor) -> Tensor:
    """The error of the float32 function in units of the last place of the result, against float64 libm."""
    got = _unary(x, name)
    truth = _torch_function(name)(x.double())
    rounded = truth.float()
    assert torch.equal(got.isnan(), rounded.isnan()), name
    edge = (truth.abs() > torch.finfo(torch.float32).max) | (got.isinf() & (rounded.abs() > 3.4e38))
    _, exponent = torch.frexp(truth)
    ulp = torch.exp2((exponent - 24).clamp(min=-149).double())
    error = (got.double() - truth).abs() / ulp
    return torch.where(edge | rounded.isnan() | (got == rounded), torch.zeros_like(error), error)


# Errors seen over all binades, rounded up.
@pytest.mark.parametrize(
    ("name", "bound"),
    [("exp", 1.0), ("exp2", 1.0), ("expm1", 1.6), ("log", 1.0), ("log2", 1.6), ("log10", 1.1), ("log1p", 1.5)]
    + [("sigmoid", 2.2), ("tanh", 2.4), ("erf", 1.0), ("sin", 1.6), ("cos", 1.6), ("rsqrt", 1.1), ("sqrt", 0.0)],
)
def test_our_functions_are_accurate_in_every_binade(name: str, bound: float) -> None:
    bits = torch.arange(-(2**31), 2**31, 20011, dtype=torch.int64).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.linspace(-20, 20, 50001), torch.linspace(0.5, 2, 20001)])
    assert float(_ulps(name, x).max()) <= bound


@pytest.mark.parametrize("name", ["exp", "log", "sigmoid"])
def test_our_double_functions_are_accurate(name: str) -> None:
    x = torch.randn(20000, dtype=torch.float64) * torch.exp2(torch.randint(-30, 8, (20000,)).double())
    got, libm = _unary(x, name), _torch_function(name)(x)
    error = ((got - libm).abs() / libm.abs().clamp(min=5e-324))[libm.isfinite() & (libm != 0) & (libm.abs() > 1e-300)]
    assert float(error.max()) <= 4 * 2.0**-53 * 2
    assert torch.equal(got.isnan(), libm.isnan())


def test_special_values_are_what_ieee_754_says() -> None:
    inf, nan = math.inf, math.nan
    for name, pairs in {
        "exp": [(-inf, 0.0), (inf, inf), (0.0, 1.0), (-0.0, 1.0), (89.0, inf), (-104.0, 0.0), (nan, nan)],
        "exp2": [(-149.0, 2.0**-149), (10.0, 1024.0), (128.0, inf), (-126.0, 2.0**-126)],
        "expm1": [(-0.0, -0.0), (-inf, -1.0), (inf, inf), (1e-45, 1e-45)],
        "sqrt": [(0.0, 0.0), (-0.0, -0.0), (inf, inf), (-1.0, nan), (nan, nan), (4.0, 2.0)],
        "log": [(0.0, -inf), (-0.0, -inf), (inf, inf), (-1.0, nan), (1.0, 0.0), (nan, nan)],
        "log2": [(8.0, 3.0), (2.0**-149, -149.0), (0.0, -inf)],
        "log1p": [(-0.0, -0.0), (-1.0, -inf), (-2.0, nan), (inf, inf), (1e-45, 1e-45)],
        "sigmoid": [(-inf, 0.0), (inf, 1.0), (0.0, 0.5)],
        "tanh": [(-0.0, -0.0), (inf, 1.0), (-inf, -1.0), (1e-45, 1e-45), (nan, nan)],
        "erf": [(-0.0, -0.0), (inf, 1.0), (-inf, -1.0)],
        "sin": [(-0.0, -0.0), (inf, nan)],
        "cos": [(0.0, 1.0), (-inf, nan)],
    }.items():
        x, y = (torch.tensor(column) for column in zip(*pairs, strict=True))
        assert same_bits(_unary(x, name), y), f"{name}: {_unary(x, name).tolist()}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(333).to(dtype)
    for name in _OURS:
        wide, half = _unary(x.float(), name), _unary(x, name)
        assert same_bits(half[~wide.isnan()], wide[~wide.isnan()].to(dtype)), name
        assert torch.equal(half.isnan(), wide.isnan()), name


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_strides_do_not_show_and_dense_ones_are_kept(dtype: torch.dtype) -> None:
    x = torch.randn(5, 6, 700).to(dtype)
    want = _unary(x, "exp")
    for view in (lambda t: t.transpose(0, 2), lambda t: t[:, ::2, 3:], lambda t: t[2:3, :, :1].expand(4, 6, 5)):
        assert same_bits(_unary(view(x), "exp"), view(want).contiguous())
    assert _unary(x.transpose(0, 2), "exp").stride() == x.transpose(0, 2).stride()
    assert _unary(x[:, ::2], "exp").is_contiguous()
    assert _unary(x[:0], "exp").shape == (0, 6, 700)
    assert _unary(x[0, 0, 0], "exp").shape == ()


def test_binary_functions_have_the_bits_of_compiled_ones() -> None:
    x, y = _data(torch.float32), _data(torch.float32).flip(0)
    ops = {name: op for op, name in PINNED_BINARY.items() if op not in _BY_NUMBER}
    for slice_ in (slice(None), slice(7, 8)):
        a, b = x[slice_], y[slice_]
        results = _compiled(lambda a, b: [op(a, b) for op in ops.values()], _inductor())(a, b)
        for name, result in zip(ops, results, strict=True):
            assert same_bits(result, torch.ops.bicompile.binary(a, b, name)), name


_BY_NUMBER = {op for op in PINNED_BINARY if "Scalar" in op._overloadname}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_powers_by_numbers_have_the_bits_of_compiled_ones(dtype: torch.dtype) -> None:
    x = torch.randn(200).abs().to(dtype)
    exponents = (0.5, 3, -2, 5.0, 1.7, -0.3, 31, 40)
    results = _compiled(lambda x: [x**n for n in exponents] + [2.0**x, 1.3**x], _inductor())(x)
    for n, result in zip(exponents, results, strict=False):
        number = torch.tensor(float(n)).expand(200)
        assert same_bits(result, torch.ops.bicompile.binary(x, number, "pow_by_number")), n
        with bicompile.eager():
            assert same_bits(x**n, result), n
    for base, result in zip((2.0, 1.3), results[len(exponents) :], strict=True):
        assert same_bits(result, torch.ops.bicompile.binary(torch.tensor(base).expand(200), x, "pow_of_number")), base


_DIGEST = """
#include "elementwise/math.h"
#include <cstdio>
using namespace bicompile;
uint64_t hash = 1;
template <class Vec, class F> void digest(const F& f) {
  using T = Lane<Vec>;
  for (uint64_t i = 0; i < 40000; i += Vec::kLanes) {
    T in[Vec::kLanes], out[Vec::kLanes];
    for (int k = 0; k < Vec::kLanes; k++) {
      uint64_t bits = (i + k) * 0x9e3779b97f4a7c15u;
      in[k] = (i + k) % 3 ? T(int64_t(bits) >> 40) * T(0x1p-18) : bit_cast<T>(BitsOf<T>(bits >> 32 | bits << 32));
    }
    store(out, canonical(f(load(in))));
    for (int k = 0; k < Vec::kLanes; k++) {
      T alone = f(ScalarVec<T, 1>{{in[k]}}).v[0];
      if (bit_cast<BitsOf<T>>(canonical(alone)) != bit_cast<BitsOf<T>>(out[k])) std::puts("one lane differs"), exit(1);
      hash = (hash ^ bit_cast<BitsOf<T>>(out[k])) * 0x100000001b3u;
    }
  }
}
template <class F> void digest_both(const F& f) { digest<VecF>(f), digest<VecD>(f); }
#define DIGEST(name) digest_both([](auto x) { return math::name(x); });
int main() {
  NAMES
  std::printf("%llx", (unsigned long long)hash);
}
"""


def test_bits_are_the_same_on_every_instruction_set_and_in_one_lane(tmp_path: Path) -> None:
    source = tmp_path / "digest.cpp"
    source.write_text(_DIGEST.replace("NAMES", " ".join(f"DIGEST({name})" for name in _OURS)))
    include = Path(native.__file__).parent.parent
    outputs = set()
    for isa in ("native", "avx2", "scalar"):
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", f"-I{include}", *native.build._ISA_FLAGS[isa]]
        subprocess.run([native.build.compiler(), *flags, str(source), "-o", str(tmp_path / isa)], check=True)
        outputs.add(subprocess.run([tmp_path / isa], capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1


@pytest.mark.parametrize("call", [("unary", (3, 4), "exp"), ("binary", (3, 4), "pow")], ids=lambda c: c[0])
def test_ops_pass_opcheck(call: tuple[str, tuple[int, ...], str]) -> None:
    op, shape, name = call
    tensors = [torch.rand(shape) for _ in range(1 if op == "unary" else 2)]
    torch.library.opcheck(getattr(torch.ops.bicompile, op).default, (*tensors, name))


def test_bad_arguments_are_explained() -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="expected name to be one of exp"):
        _unary(x, "gelu")
    with pytest.raises(RuntimeError, match="expected float32"):
        _unary(x.int(), "exp")
    with pytest.raises(RuntimeError, match="one shape"):
        torch.ops.bicompile.binary(x, x[:2], "pow")
    with pytest.raises(RuntimeError, match="one dtype"):
        torch.ops.bicompile.binary(x, x.double(), "pow")


# --- the patches ------------------------------------------------------------------------------------------------------

_PATCHED = [getattr(cpp, name) for name in codegen_cpu.PATCHED]


def test_trap_24_patches_are_undone_after_nesting_and_exceptions() -> None:
    before = [dict(vars(c)) for c in _PATCHED]
    with pytest.raises(KeyError), pinned_cpu_codegen(), pinned_cpu_codegen():
        assert cpp.CppVecOverrides.exp("x") == cpp.CppOverrides.exp("x") == "bicompile::inductor::exp(x)"
        raise KeyError
    assert [dict(vars(c)) for c in _PATCHED] == before
    with pinned_cpu_codegen():
        with pinned_cpu_codegen():
            pass
        assert "bicompile" in cpp.CppOverrides.tanh("x")
    assert [dict(vars(c)) for c in _PATCHED] == before


def test_unknown_functions_are_refused_by_name() -> None:
    with pinned_cpu_codegen():
        for owner in (cpp.CppOverrides, cpp.CppVecOverrides):
            with pytest.raises(UnsupportedOpError, match=r"ops\.rand:"):
                owner.rand("seed", "offset")


def test_a_function_new_to_inductor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp.CppOverrides, "wobble", staticmethod(lambda x: f"wobble({x})"), raising=False)
    with pinned_cpu_codegen(), pytest.raises(UnsupportedOpError, match=r"ops\.wobble:"):
        cpp.CppVecOverrides.wobble("x")


def test_a_torch_that_lacks_what_we_patch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpp.KernelGroup, "codegen_group")
    before = dict(vars(cpp.CppOverrides))
    with pytest.raises(codegen_cpu.CodegenError, match="codegen_group is missing"), pinned_cpu_codegen():
        pass
    assert dict(vars(cpp.CppOverrides)) == before


def test_headers_are_put_back_if_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = signature()
    monkeypatch.setenv("BICOMPILE_CACHE_DIR", str(tmp_path))
    header = materialise_headers()
    assert header == materialise_headers()
    assert header.is_file() and tmp_path in header.parents
    shutil.rmtree(header.parent)
    assert materialise_headers().is_file()
    assert signature() != here  # cached kernels name the other place
