"""``eager()``: the lowerings for code that is not compiled.

Every ATen op that runs inside the context is sorted as ``certify`` sorts the nodes of a graph: exact and
correctly rounded ops run as they are, reductions and contractions go to our ops, elementwise functions to our
definitions of them, compositions are taken apart first, and what is left is refused.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table as core_decompositions
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch.autograd import forward_ad

from .decompositions import decomposition_table
from .errors import UnsupportedOpError
from .foreach import one_by_one
from .interception import InterceptingMode, kernel_of
from .lowering.elementwise.op import PINNED_BINARY, PINNED_UNARY
from .lowering.gpu.device import unsupported
from .lowering.matmul.op import FLOATS
from .passes.op_classes import draws_one_number, exact_by_name, is_view, op_name
from .passes.pipeline import RULES
from .passes.rewriting import Replacement, bind
from .writes import WRITES, ordered

aten = torch.ops.aten
bicompile = torch.ops.bicompile

# One correctly rounded IEEE operation for each element, in PyTorch's vector code and scalar code alike.
_CORRECTLY_ROUNDED = frozenset(
    """
    aten._amp_foreach_non_finite_check_and_unscale aten._amp_update_scale aten.abs aten.bitwise_and
    aten.bitwise_left_shift aten.bitwise_not aten.bitwise_or aten.bitwise_right_shift aten.bitwise_xor aten.ceil
    aten.clamp aten.clamp_max aten.clamp_min aten.copysign aten.div aten.eq aten.floor aten.fmax aten.fmin aten.frac
    aten.frexp aten.ge aten.gt aten.isfinite aten.isinf aten.isnan aten.le aten.logical_and aten.logical_not
    aten.logical_or aten.logical_xor aten.lt aten.maximum aten.minimum aten.mul aten.ne aten.neg aten.reciprocal
    aten.relu aten.round aten.sgn aten.sign aten.signbit aten.threshold_backward aten.trunc
    """.split()
)

# The same on a GPU, where PyTorch's kernels and compiled ones differ in more: in which of +0 and -0 is the larger, in
# the sign of a NaN that is negated, in rounding denormals to integers.
_CORRECTLY_ROUNDED_ON_GPU = frozenset(
    """
    aten._amp_foreach_non_finite_check_and_unscale aten._amp_update_scale aten.bitwise_and aten.bitwise_left_shift
    aten.bitwise_not aten.bitwise_or aten.bitwise_right_shift aten.bitwise_xor aten.eq aten.ge aten.gt aten.isfinite
    aten.isinf aten.isnan aten.le aten.logical_and aten.logical_not aten.logical_or aten.logical_xor aten.lt aten.mul
    aten.ne aten.sqrt
    """.split()
)
# With an alpha PyTorch's scalar code may contract these, its vector code not.
_WITH_ALPHA = frozenset("aten.add aten.sub aten.rsub".split())
# Of 0.0 and -0.0 these take either on a GPU.
_FIRST_OF_EQUAL = frozenset([aten.max.default, aten.max.dim, aten.min.default, aten.min.dim])
# Of equal elements these name any on a GPU, so none runs as it is there: topk and sort are lowered, others refused.
_FREE_TIES = frozenset("aten.kthvalue aten.median aten.mode aten.nanmedian aten.sort aten.topk".split())

# What to do instead of an op that is refused.
_WAYS_OUT = {
    "aten.multinomial": "Draw each row by a seed of its own: bicompile.sampling.SeededSampler (in transformers' "
    "generate, a logits processor beside do_sample=False)",
}


@contextlib.contextmanager
def eager(*, allow: Iterable[str] = (), on_refused: Literal["error", "warn"] = "error") -> Iterator[None]:
    """Run uncompiled code with batch-invariant lowerings, in this thread, until the context is left.

    Covers what surrounds a compiled model: a sampling loop, a metric, the code between two graphs.  May be nested and
    is undone by exceptions.  Backward passes that run inside the context are covered too.  On a GPU, an elementwise
    function is compiled when it is first met with a dtype, which takes about a second.

    Args:
        allow: op names, such as ``"aten.multinomial"``, that the caller takes responsibility for.
        on_refused: ``error`` raises on an unproven op, ``warn`` warns and runs it as it is.

    Raises:
        UnsupportedOpError: an op inside is not proven, and not allowed.
        NativeBuildError: an op inside computes on the CPU, and the CPU kernels cannot be built.
    """
    mode = _LoweringMode(frozenset(allow), on_refused)
    with enable_python_dispatcher(), mode:
        yield


class _LoweringMode(InterceptingMode):
    """Sends each op where it belongs; what an op is taken apart into passes through here again."""

    supports_higher_order_operators = True  # to refuse them by name, such as flex_attention

    def __init__(self, allow: frozenset[str], on_refused: str) -> None:
        super().__init__()
        self._allow = allow
        self._on_refused = on_refused

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code is compiled inside the context too; Dynamo would run it as it is beneath any other mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._refuse(func, args, kwargs)
        tensors = _tensors((*args, *kwargs.values()))
        on_gpu = _on_gpu(tensors)
        plain = len(args) == 2 and not kwargs
        rounds = _rounds_correctly(func, on_gpu, plain) and not any(x.is_complex() for x in tensors)
        if rounds or _is_exact(func, on_gpu):  # most calls: whatever is asked before this, is asked for each of them
            with no_python_dispatcher():
                return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and _is_composite(func, on_gpu):  # else autograd takes them apart
            with self:
                return func.decompose(*args, **kwargs)
        if (better := ordered(func, args, kwargs)) is not None:
            args, kwargs = better, {}
        if _runs_as_it_is(func, args, kwargs, tensors, on_gpu):
            with no_python_dispatcher():  # a thread that communicates would have it, and wait for this one
                return func(*args, **kwargs)
        if any(x.is_nested for x in tensors):
            return self._refuse(func, args, kwargs)
        if (target := _functional(func)) is not None:
            return self._mutate(func, target, args, kwargs)
        if (result := _lowered(func, args, kwargs)) is not None:
            return result
        if (result := (_elementwise_on_gpu if on_gpu else _elementwise_on_cpu)(func, args, kwargs)) is not None:
            return result
        if _always_draws(func):
            return self._refuse(func, args, kwargs)
        for table in (decomposition_table(), core_decompositions):
            if (decomposition := table.get(func)) is not None:
                with self:
                    result = decomposition(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        with self:
            if (results := one_by_one(func, args, kwargs)) is not None:
                return results
        return self._refuse(func, args, kwargs)

    def _mutate(self, func: OpOverload, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute in-place and out= ops by their functional form, then copy."""
        given = bind(func, args, kwargs)  # defaults too: bernoulli_ has one where bernoulli has none
        out = given.pop("out", None)
        destination = args[0] if out is None else out
        with self:
            result = target(**given)
        if isinstance(destination, (list, tuple)):  # of a _foreach op
            for own, part in zip(destination, result, strict=True):
                own.copy_(part)
            return None
        if out is not None and destination.shape != result.shape:
            destination.resize_(result.shape)
        return destination.copy_(result)

    def _refuse(self, func: OpOverload | HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._allow & {op_name(func), str(func)}:
            tensors = _tensors((args, kwargs))
            advice = _WAYS_OUT.get(op_name(func), "Rewrite it with supported ops")
            if any(x.is_nested for x in tensors):
                advice = "Pad the nested tensor and mask the padding"
            message = (
                f"{func}: no batch-invariant form of this op is known; it got tensors of shapes "
                f"{[tuple(x.shape) for x in tensors]}. {advice}, or take responsibility for it with "
                f"bicompile.eager(allow=[{op_name(func)!r}])."
            )
            if self._on_refused == "error":
                raise UnsupportedOpError(message)
            warnings.warn(message, stacklevel=3)
        return func(*args, **kwargs)


@kernel_of(aten.linear.default)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer: PyTorch takes one apart into four ops or more, each of which comes through the mode.

    Those are for what is differentiated, traced, watched by another mode, or no plain tensor.
    """
    given = [x, weight] if bias is None else [x, weight, bias]
    if not (
        _alone()
        and all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_nested for t in given)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and x.dtype in FLOATS
        and all(t.dtype == x.dtype and t.device == x.device for t in given)
        and [t.dim() for t in given[1:]] == [2, 1][: len(given) - 1]
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape[0] == weight.shape[0])
        and not x.is_meta
    ):
        return aten.linear.default._op_dk(DispatchKey.CompositeImplicitAutograd, x, weight, bias)
    _on_gpu(given)  # raises where there are no lowerings
    with no_python_dispatcher(), torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
        factors = (x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight.t())
        op, operands = (aten.mm.default, factors) if bias is None else (aten.addmm.default, (bias, *factors))
        product: Tensor = _lowered(op, operands, {})
        return product.view(*x.shape[:-1], weight.shape[0])


def _alone() -> bool:
    """Whether ``eager()`` is the only mode here, no transform of torch.func is, and no derivative goes forward."""
    return (
        torch._C._len_torch_dispatch_stack() == 1
        and isinstance(torch._C._get_dispatch_stack_at(0), _LoweringMode)
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


@functools.cache
def _is_composite(func: OpOverload, on_gpu: bool) -> bool:
    """Whether PyTorch defines the op by other ops on this device, and its gradient by theirs."""
    own = DispatchKey.CUDA if on_gpu else DispatchKey.CPU
    key = DispatchKey.CompositeImplicitAutograd
    return func.has_kernel_for_dispatch_key(key) and not func.has_kernel_for_dispatch_key(own)


@functools.cache
def _always_draws(func: OpOverload) -> bool:
    """Whether the op draws random numbers, in evaluation too, and not just a dropout's."""
    modes = {"train", "training"} & {argument.name for argument in func._schema.arguments}
    return torch.Tag.nondeterministic_seeded in func.tags and not modes


_unsupported = functools.cache(unsupported)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, and in lists of them; PyTorch's own walk takes longer than many an op."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
        elif isinstance(value, dict):
            found += _tensors(value.values())
    return found


def _on_gpu(tensors: list[Tensor]) -> bool:
    """Whether one of them is on a GPU.

    Raises:
        UnsupportedOpError: one is on a device for which there are no lowerings.
    """
    found = False
    for x in tensors:
        if not (x.is_cpu or x.is_meta):
            if reason := _unsupported(x.device):
                raise UnsupportedOpError(f"bicompile.eager(): a tensor is on {x.device}: {reason}")
            found = True
    return found


@functools.cache
def _is_exact(func: OpOverload, on_gpu: bool) -> bool:
    """Whether the op is ours, or moves, compares or selects values, whatever its arguments."""
    if func.namespace == "bicompile":
        return True
    return not _looks_at_arguments(func, on_gpu) and (
        exact_by_name(func) or is_view(func) or torch.Tag.inplace_view in func.tags
    )


@functools.cache
def _rounds_correctly(func: OpOverload, on_gpu: bool, plain: bool) -> bool:
    """Whether the op is one correctly rounded operation for each real element; if ``plain``, of its two arguments."""
    if _looks_at_arguments(func, on_gpu) or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    name = _arithmetic_name(func)
    known = _CORRECTLY_ROUNDED_ON_GPU if on_gpu else _CORRECTLY_ROUNDED
    return name in known or (plain and name in _WITH_ALPHA)


def _looks_at_arguments(func: OpOverload, on_gpu: bool) -> bool:
    """Whether it depends on the arguments what an otherwise exact op does with elements that are equal, or written to
    one place."""
    return func in WRITES or (on_gpu and (func in _FIRST_OF_EQUAL or op_name(func) in _FREE_TIES))


def _arithmetic_name(func: OpOverload) -> str:
    """``aten.add`` for ``aten.add_.Tensor`` and ``prims.add.default``."""
    return op_name(func).replace("prims.", "aten.").rstrip("_")


def _runs_as_it_is(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], on_gpu: bool
) -> bool:
    """Whether the op is exact or correctly rounded for these arguments."""
    real = any(t.is_floating_point() or t.is_complex() for t in tensors)
    if on_gpu and func in _FIRST_OF_EQUAL:
        return not real  # of 0.0 and -0.0 either, where compiled code takes a certain one
    if on_gpu and op_name(func) in _FREE_TIES and func not in (aten.median.default, aten.nanmedian.default):
        return bool(kwargs.get("stable"))
    if func in WRITES:  # whose arguments are ordered
        return not bind(func, args, kwargs).get("accumulate")
    if torch.Tag.nondeterministic_seeded in func.tags:
        return draws_one_number(func, args)
    if any(t.is_complex() for t in tensors):
        return False
    name = _arithmetic_name(func)
    if name in _WITH_ALPHA:
        return bind(func, args, kwargs).get("alpha", 1) == 1
    if on_gpu and name == "aten.div":  # by a number, PyTorch multiplies by the reciprocal
        return len(args) == 2 and all(isinstance(x, Tensor) and x.is_cuda and x.is_floating_point() for x in args)
    if name == "aten.pow" and real and not on_gpu:  # a square is one operation
        exponent = bind(func, args, kwargs).get("exponent")
        return not isinstance(exponent, Tensor) and exponent in (0, 1, 2)
    integers = bool(tensors) and not real
    return integers and not _makes_real(func, kwargs)


def _makes_real(func: OpOverload, kwargs: dict[str, Any]) -> bool:
    """Whether an op on integers computes in floating point: by dtype, or because it is a function like exp."""
    dtype = kwargs.get("dtype")
    promotes = func in PINNED_UNARY or op_name(func).rstrip("_") in ("aten.atan2", "aten.div")
    return promotes or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)


@functools.cache
def _functional(func: OpOverload) -> OpOverload | None:
    """The functional form of an in-place or out= op; None for an op that mutates nothing."""
    if not func._schema.is_mutable:
        return None
    namespace = getattr(torch.ops, func.namespace)
    packet = getattr(namespace, func._opname.rstrip("_"), None)
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if not a.is_out]
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        have = [(a.name, str(a.type)) for a in candidate._schema.arguments]
        if have == wanted and not candidate._schema.is_mutable:
            return candidate
    return None


def _lowered(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The op by one of our own, or None."""
    if (rule := RULES.get(func)) is not None:
        replacement = rule(func, bind(func, args, kwargs))
        return None if replacement is None else _run(replacement)
    return None


def _elementwise_on_cpu(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A function that ``math.h`` defines, or None for any other op."""
    if any(isinstance(x, Tensor) and x.is_complex() for x in args):
        return None
    if func in PINNED_UNARY:
        return _pinned(bicompile.unary.default, args[:1], PINNED_UNARY[func])
    if func in PINNED_BINARY:
        return _pinned(bicompile.binary.default, args[:2], PINNED_BINARY[func])
    return None


def _pinned(target: Callable[..., Tensor], operands: tuple[Any, ...], name: str) -> Tensor:
    """An elementwise function of ours, with PyTorch's type promotion and broadcasting."""
    dtype = torch.result_type(operands[0], operands[-1])
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    device = next(x.device for x in operands if isinstance(x, Tensor))
    # A number is not rounded to a half precision: compiled code holds it in float32, where the function is computed.
    wide = torch.promote_types(dtype, torch.float32)
    tensors = [torch.as_tensor(x, dtype=dtype if isinstance(x, Tensor) else wide, device=device) for x in operands]
    if any(x.shape != tensors[0].shape for x in tensors):
        tensors = list(torch.broadcast_tensors(*tensors))
    return target(*tensors, name)


def _elementwise_on_gpu(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An elementwise op by a compiled kernel of its own, or None for any other op."""
    from .lowering.elementwise.gpu import compiled

    tensors = _tensors((args, kwargs))
    if torch.Tag.pointwise not in func.tags or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    if not tensors or any(x.is_complex() for x in tensors):
        return None
    if func in (aten.div.Tensor, aten.div.Scalar):
        return _divided_on_gpu(args[0], args[1])
    return compiled(func, args, kwargs)


def _divided_on_gpu(a: Any, b: Any) -> Tensor:
    """The correctly rounded quotient of operands that are not both floating-point tensors on a GPU."""
    device = next(x.device for x in (a, b) if isinstance(x, Tensor) and x.is_cuda)
    dtype = torch.result_type(a, b)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    # As in _pinned: compiled code holds a number in float32.
    wide = torch.promote_types(dtype, torch.float32)
    a, b = (
        x.to(device, wide) if isinstance(x, Tensor) else torch.full((), x, dtype=wide, device=device) for x in (a, b)
    )
    return torch.div(a, b).to(dtype)


def _run(replacement: Replacement) -> Any:
    result = replacement.target(*replacement.args, **replacement.kwargs)
    return result if replacement.output is None else result[replacement.output]
