"""Send sums, means, products, variances, norms and log-sum-exps to the row reductions.

Before::

    mean: "f32[s0, 7, 1]" = torch.ops.aten.mean.dim(x, [-1], True)    # x: "f32[s0, 7, 576]"

After::

    mean: "f32[s0, 7, 1]" = torch.ops.bicompile.mean.default(x, [-1], True, torch.float32)

``mean(x * x)`` and ``sum(x * x)`` become ``mean_square`` and ``sum_square``, which read ``x`` once and give the same
bits, so that a norm does not write its squares to memory.
Left alone: reductions of integers and booleans, which are exact in any order.  One of numbers into an integer dtype
becomes one of integers.
Numerics: changed (one order, see ``lowering.reduction.order``).  Shape, dtype and strides: unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from .rewriting import Replacement, converted, into_integers, is_real, lower_by_rules, prims, value

aten = torch.ops.aten
bicompile = torch.ops.bicompile

_SQUARED = {bicompile.sum.default: bicompile.sum_square.default, bicompile.mean.default: bicompile.mean_square.default}
_SUMS = {
    aten.sum.default: bicompile.sum.default,
    aten.sum.dim_IntList: bicompile.sum.default,
    aten.mean.default: bicompile.mean.default,
    aten.mean.dim: bicompile.mean.default,
    aten.prod.default: bicompile.prod.default,
    aten.prod.dim_int: bicompile.prod.default,
}


def _sum(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    """sum, mean and prod, over all dims, one or several, with an optional dtype."""
    x = args["self"]
    dtype = args.get("dtype") or value(x).dtype
    if not dtype.is_floating_point:
        return into_integers(op, args)
    if not is_real(x):
        x = converted(x, dtype)
    target = _SUMS[op]
    dims, keepdim = _dims(args.get("dim")), bool(args.get("keepdim", False))
    if target in _SQUARED and (squared := _square_root_of(x, dtype)) is not None:
        return Replacement(_SQUARED[target], (squared, dims, keepdim, dtype))
    return Replacement(target, (x, dims, keepdim, dtype))


def _square_root_of(x: Any, dtype: torch.dtype) -> Node | None:
    """``y`` where ``x`` is ``y * y`` in the dtype of the accumulator."""
    if (
        not isinstance(x, Node)
        or x.op != "call_function"
        or value(x).dtype not in (torch.float32, torch.float64)
        or dtype != value(x).dtype
    ):
        return None
    is_power = x.target is aten.pow.Tensor_Scalar and x.args[1] == 2
    is_product = x.target is aten.mul.Tensor and x.args[0] is x.args[1]
    if not (is_power or is_product):
        return None
    y: Any = x.args[0]
    if not is_real(y) or value(y).dtype != dtype:
        return None
    # A widening conversion is exact, so the kernel may do it: it then reads half the bytes.
    if y.target is prims.convert_element_type.default and value(y.args[0]).dtype in (torch.bfloat16, torch.float16):
        if dtype == torch.float32:
            return y.args[0]
    return y


def _dims(dim: Any) -> list[int]:
    """``dim`` as the reduction ops take it: a list, empty for all."""
    if dim is None:
        return []
    return [dim] if isinstance(dim, int) else list(dim)


def _extremum(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    """amax and amin: exact, but which zero wins (+0 or -0) is pinned too."""
    if not is_real(args["self"]):
        return None
    target = bicompile.amax.default if op in (aten.amax.default, aten.max.default) else bicompile.amin.default
    dims, keepdim = _dims(args.get("dim")), bool(args.get("keepdim", False))
    return Replacement(target, (args["self"], dims, keepdim, value(args["self"]).dtype))


def _variance(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    """var and std."""
    if not is_real(args["self"]):
        return None
    is_std = op is aten.std.correction
    return Replacement(bicompile.var.default, (*_variance_args(args), is_std), output=0)


def _variance_and_mean(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    is_std = op is aten.std_mean.correction
    return Replacement(bicompile.var.default, (*_variance_args(args), is_std))


def _variance_args(args: dict[str, Any]) -> tuple[Any, ...]:
    correction = 1.0 if args["correction"] is None else float(args["correction"])
    return args["self"], _dims(args["dim"]), correction, args["keepdim"]


def _vector_norm(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    x = args["self"]
    dtype = args["dtype"] or value(x).dtype
    if not is_real(x):
        return None
    return Replacement(
        bicompile.vector_norm.default, (x, float(args["ord"]), _dims(args["dim"]), args["keepdim"], dtype)
    )


def _logsumexp(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    return Replacement(bicompile.logsumexp.default, (args["self"], _dims(args["dim"]), args["keepdim"]))


RULES = {
    **{target: _sum for target in _SUMS},
    aten.amax.default: _extremum,
    aten.amin.default: _extremum,
    aten.max.default: _extremum,
    aten.min.default: _extremum,
    aten.var.correction: _variance,
    aten.std.correction: _variance,
    aten.var_mean.correction: _variance_and_mean,
    aten.std_mean.correction: _variance_and_mean,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.logsumexp.default: _logsumexp,
}


def lower_reductions_pass(gm: GraphModule) -> PassResult:
    """Replace every floating-point reduction in ``gm``, in place; say whether there was one."""
    return lower_by_rules(gm, RULES)
