"""``bicompile::sdpa``, its backward, and ``scaled_dot_product_attention`` with ATen's signature on top of them.

``bicompile::mask_rows`` is what a GPU reads of a mask before it attends: where each row's keys begin, have their first
gap, and end.  ``sdpa`` does it itself where it is not given these ``rows``; the CPU's has no use for them.

Dropout: ``seeds`` are ``bicompile.dropout.keys_of(q)``, a number for each query row.  Whether the weight of a key is
dropped follows from the row's seed and from how far the key is from the first one that the row's mask lets it see.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from bicompile.lowering.gpu.plans import on_gpu

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIB.define(
    "sdpa(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, Tensor? rows=None, "
    "Tensor? seeds=None, float dropout_p=0.0) -> (Tensor out, Tensor lse)",
    tags=_TAGS,
)
_LIB.define("mask_rows(Tensor mask, bool is_causal) -> Tensor", tags=_TAGS)
_LIB.define(
    "sdpa_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, bool is_causal, "
    "float scale, bool mask_grad, Tensor? seeds=None, float dropout_p=0.0) -> (Tensor dq, Tensor dk, Tensor dv, "
    "Tensor dmask)",
    tags=_TAGS,
)


@torch.library.register_fake("bicompile::sdpa", lib=_LIB)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    rows: Tensor | None = None,
    seeds: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    check_op("sdpa", q, k, v, mask, seeds, dropout_p)
    batch, heads, queries, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)
    lse = q.new_empty((batch, heads, queries), dtype=statistics_dtype(q.dtype))
    return out, lse


@torch.library.register_fake("bicompile::mask_rows", lib=_LIB)
def _(mask: Tensor, is_causal: bool) -> Tensor:
    torch._check(
        2 <= mask.dim() <= 4,
        lambda: f"bicompile::mask_rows: expected a mask of 2 to 4 dims, [..., queries, keys], got {tuple(mask.shape)}",
    )
    return mask.new_empty((3, *(1,) * (4 - mask.dim()), *mask.shape[:-1]), dtype=torch.int32)


@torch.library.register_fake("bicompile::sdpa_backward", lib=_LIB)
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    mask_grad: bool,
    seeds: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_op("sdpa_backward", q, k, v, mask, seeds, dropout_p)
    expected = (*q.shape[:3], v.shape[3])
    torch._check(
        grad.shape == expected and out.shape == expected,
        lambda: (
            f"bicompile::sdpa_backward: expected grad and out of shape {tuple(expected)}, got {tuple(grad.shape)} and "
            f"{tuple(out.shape)}"
        ),
    )
    dmask = mask.new_empty(mask.shape) if mask is not None and mask_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dmask


def check_op(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seeds: Tensor | None, dropout_p: float
) -> None:
    """What the ops themselves take: four dims, nothing broadcast but the mask."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    torch._check(
        q.dim() == 4 and k.dim() == 4 and v.dim() == 4,
        lambda: f"bicompile::{op}: expected q, k, v of 4 dims, [batch, heads, length, depth], got {shapes}",
    )
    torch._check(
        q.dtype == k.dtype == v.dtype and q.dtype in _FLOATS,
        lambda: (
            f"bicompile::{op}: expected q, k, v of one dtype of float32, float64, bfloat16 and float16, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}; cast them first"
        ),
    )
    pairs = [(k.shape[0], q.shape[0]), (v.shape[0], q.shape[0]), (k.shape[1], v.shape[1])]
    for got, expected in [*pairs, (k.shape[2], v.shape[2]), (k.shape[3], q.shape[3])]:
        torch._check(
            got == expected,
            lambda: f"bicompile::{op}: expected q [B, H, L, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv], got {shapes}",
        )
    torch._check(
        mask is None or (mask.dim() <= 4 and mask.dtype in (torch.bool, torch.float32, q.dtype)),
        lambda: f"bicompile::{op}: expected a mask of at most 4 dims, of bool, float32 or q's dtype {q.dtype}",
    )
    if seeds is None:
        torch._check(dropout_p == 0.0, lambda: f"bicompile::{op}: expected seeds for dropout_p={dropout_p}, got None")
        return
    torch._check(
        seeds.shape == q.shape[:3] and seeds.dtype == torch.int64 and 0.0 <= dropout_p <= 1.0,
        lambda: (
            f"bicompile::{op}: expected int64 seeds of shape {tuple(q.shape[:3])} and dropout_p from 0 to 1, got "
            f"{seeds.dtype} of shape {tuple(seeds.shape)} and {dropout_p}"
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, is_causal, scale, _, seeds, dropout_p = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, mask, out, lse, seeds)
    ctx.is_causal, ctx.scale, ctx.dropout_p = is_causal, scale, dropout_p


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, mask, out, lse, seeds = ctx.saved_tensors
    mask_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dmask = torch.ops.bicompile.sdpa_backward(
        grad, q, k, v, mask, out, lse, ctx.is_causal, ctx.scale, mask_grad, seeds, ctx.dropout_p
    )
    return dq, dk, dv, dmask if mask_grad else None, None, None, None, None, None


def _unsupported(message: str) -> Exception:
    from bicompile.errors import UnsupportedOpError  # late: bicompile imports this module

    return UnsupportedOpError(message)


def _refuse_second_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise _unsupported(
        "bicompile::sdpa_backward: expected a gradient that is not differentiated again, got a second derivative of "
        "attention, which PyTorch's fused attention has not either. Compute attention as a product, a softmax and a "
        "product where you need one."
    )


torch.library.register_autograd("bicompile::sdpa", _backward, setup_context=_setup_context, lib=_LIB)
torch.library.register_autograd("bicompile::sdpa_backward", _refuse_second_derivative, lib=_LIB)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` in the batch-invariant order.

    Takes every form that PyTorch takes: 2-D to n-D inputs, leading dims that broadcast, boolean (True: attend) and
    additive masks that broadcast to ``[..., L, S]``, ``is_causal`` aligned to the upper left, grouped query heads.  A
    query row that sees no key gives zeros and has zero gradients.  What ``dropout_p`` drops of a row follows from a
    seed drawn for the call, the row's query and its keys' places: see ``bicompile.dropout``.

    Raises:
        UnsupportedOpError: inside a transform of ``torch.func``.
        ValueError: shapes or dtypes that do not go together.
    """
    # Dynamo, which calls this for transformers, cannot trace the question; a graph's op then says no by itself.
    if not torch.compiler.is_dynamo_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise _unsupported(
            "scaled_dot_product_attention: expected no transform of torch.func around it, got one, such as grad or "
            "vmap, which its gradient does not serve. Compute attention there as a product, a softmax and a product "
            "(in transformers, attn_implementation='eager')."
        )
    _check(query, key, value, attn_mask, is_causal, enable_gqa)
    if scale is None:
        scale = _default_scale(query.shape[-1])
    if enable_gqa and key.shape[-3] != value.shape[-3]:
        key, value = (_repeat_heads(t, query) for t in (key, value))
    if _is_plain(query, key, value, attn_mask, enable_gqa):
        return _attend(query, key, value, attn_mask, is_causal, scale, dropout_p)
    lead, heads, kv_heads = _leading_dims(query, key, value, enable_gqa)
    out = _attend(
        _four_dims(query, lead, heads),
        _four_dims(key, lead, kv_heads),
        _four_dims(value, lead, kv_heads),
        None if attn_mask is None else _mask_for(attn_mask, lead, heads),
        is_causal,
        scale,
        dropout_p,
    )
    if len(lead) > 1:
        return out.unflatten(0, lead)
    if lead:
        return out
    out = out.squeeze(0)
    return out if max(query.dim(), key.dim(), value.dim()) > 2 else out.squeeze(0)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float, dropout_p: float
) -> Tensor:
    """The op, on what it takes."""
    if dropout_p == 0.0:
        return torch.ops.bicompile.sdpa(query, key, value, mask, is_causal, scale)[0]
    from bicompile.dropout import keys_of  # late: bicompile imports this module

    seeds = keys_of(query).squeeze(-1)
    return torch.ops.bicompile.sdpa(query, key, value, mask, is_causal, scale, None, seeds, dropout_p)[0]


def _is_plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool) -> bool:
    """The form that nearly every model uses: four dims, nothing to broadcast but the mask."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    batch, heads = query.shape[:2]
    if key.shape[:2] != value.shape[:2] or key.shape[0] != batch:
        return False
    if key.shape[1] != heads and not (enable_gqa and key.shape[1] > 0 and heads % key.shape[1] == 0):
        return False
    return mask is None or (
        mask.dim() <= 4
        and all(
            size == full or size == 1 for size, full in zip(reversed(mask.shape[:-2]), (heads, batch), strict=False)
        )
    )


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> None:
    """Raise ValueError, with ATen's words first, where it would raise one of its errors."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}"
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "Expected query, key, and value to have the same dtype, but got "
            f"query.dtype: {query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype}. Cast them to one."
        )
    if query.dtype not in _FLOATS:
        raise ValueError(
            "scaled_dot_product_attention: expected float32, bfloat16, float16 or float64, "
            f"got {query.dtype}; cast query, key and value first"
        )
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise ValueError(f"Expected query, key, and value to all be at least 2 dimensional, but got {shapes}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"scaled_dot_product_attention: query and key differ in their last dim: {shapes}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"scaled_dot_product_attention: expected key and value with the same number of keys, got {shapes}"
        )
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) < 3:
        raise ValueError(f"scaled_dot_product_attention: enable_gqa=True needs inputs with a head dim, got {shapes}")
    if mask is None:
        return
    if is_causal:
        raise ValueError("Explicit attn_mask should not be set when is_causal=True")
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise ValueError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
            f"attn_mask.dtype: {mask.dtype} and query.dtype: {query.dtype}. Cast the mask."
        )
    for dim, size in zip((-1, -2), (key.shape[-2], query.shape[-2]), strict=True):
        if mask.dim() >= -dim and mask.shape[dim] != size and mask.shape[dim] != 1:
            raise ValueError(
                f"scaled_dot_product_attention: attn_mask of shape {tuple(mask.shape)} does not broadcast to "
                f"[..., {query.shape[-2]}, {key.shape[-2]}] for {shapes}"
            )


def _default_scale(depth: int | torch.SymInt) -> float:
    if isinstance(depth, int):
        return 1.0 / math.sqrt(depth) if depth > 0 else 1.0  # at depth 0 every score is 0, and stays it
    return 1.0 / torch.sym_sqrt(depth)


def _repeat_heads(t: Tensor, query: Tensor) -> Tensor:
    """Keys or values with a head for each query head, for the rare case in which their heads differ in number."""
    _check_group(query.shape[-3], t.shape[-3])
    return t.repeat_interleave(query.shape[-3] // max(t.shape[-3], 1), dim=-3)


def _check_group(heads: int, kv_heads: int) -> None:
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            "Number of heads in key and value must divide the number of heads in query, "
            f"but got {kv_heads} and {heads} with enable_gqa=True"
        )


def _leading_dims(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[torch.Size, int, int]:
    """Dims before the heads, heads of queries and heads of keys, all broadcast."""
    of_q, of_k, of_v = (t.shape[-3] if t.dim() > 2 else 1 for t in (query, key, value))
    try:
        lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        (kv_heads,) = torch.broadcast_shapes((of_k,), (of_v,))
        # One key head for all query heads is a group; any other number must be theirs.
        (heads,) = (of_q,) if enable_gqa else torch.broadcast_shapes((of_q,), (kv_heads,))
    except RuntimeError as error:
        raise ValueError(
            f"scaled_dot_product_attention: the leading dims of query {tuple(query.shape)}, key {tuple(key.shape)} and "
            f"value {tuple(value.shape)} do not broadcast; grouped query heads need enable_gqa=True"
        ) from error
    if enable_gqa:
        _check_group(heads, kv_heads)
    return lead, heads, kv_heads


def _four_dims(t: Tensor, lead: torch.Size, heads: int) -> Tensor:
    """``t`` as [batch, heads, length, depth], its leading dims broadcast to ``lead`` and made one."""
    if t.dim() == 2:
        t = t.unsqueeze(0)
    shape = (*lead, heads, *t.shape[-2:])
    if t.shape != shape:
        t = t.expand(shape)
    return t if len(lead) == 1 else t.reshape(math.prod(lead), *shape[-3:])


def _mask_for(mask: Tensor, lead: torch.Size, heads: int) -> Tensor:
    """``mask`` with at most four dims; the op broadcasts them."""
    full = (*lead, heads)
    own = mask.shape[:-2]
    if len(own) > len(full) or any(a not in (1, b) for a, b in zip(reversed(own), reversed(full), strict=False)):
        raise ValueError(
            f"scaled_dot_product_attention: attn_mask of shape {tuple(mask.shape)} does not broadcast to the leading "
            f"dims {full} of the output"
        )
    if len(lead) <= 1 or len(own) <= 1:
        return mask
    return mask.expand(*lead, *mask.shape[-3:]).reshape(math.prod(lead), *mask.shape[-3:])


on_gpu(_LIB, f"{__package__}.gpu", "sdpa")
on_gpu(_LIB, f"{__package__}.problem", "mask_rows")
on_gpu(_LIB, f"{__package__}.gpu_backward", "sdpa_backward")
