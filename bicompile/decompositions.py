"""Which ATen ops AOTAutograd takes apart before the passes see the graph.

Inductor's table with two changes.  Reductions and contractions stay whole, because Inductor would break them up, or
rewrite them by shape (``mm`` becomes mul and sum where a static size is 1), into pieces that no longer say what is
summed in which order.  And ops that hide a reduction or a contraction inside are written as the ones that the
passes know: their *normal form*.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import cat as _stock_cat
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload, OpOverloadPacket

from . import (
    bags,
    collectives,
    complexes,
    convolution,
    distances,
    dropout,
    foreach,
    inverses,
    norms,
    pooling,
    resizing,
    writes,
)
from .errors import UnsupportedOpError
from .lowering.attention.op import scaled_dot_product_attention
from .lowering.softmax.cross_entropy import log_probability

aten = torch.ops.aten

# Left whole for the passes (see bicompile.passes.pipeline).
_KEPT_WHOLE: tuple[OpOverloadPacket, ...] = (
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten.sum,
    aten.mean,
    aten.prod,
    aten.var,
    aten.std,
    aten.var_mean,
    aten.std_mean,
    aten.linalg_vector_norm,
    aten.logsumexp,
    aten._softmax,
    aten._log_softmax,
    aten._safe_softmax,
    aten._softmax_backward_data,
    aten._log_softmax_backward_data,
    aten.cumsum,
    aten.cumprod,
    aten.logcumsumexp,
    aten.index_add,
    aten.scatter_add,
    aten.scatter_reduce,
    aten.embedding_dense_backward,
)


def _mv(matrix: Tensor, vec: Tensor) -> Tensor:
    return torch.mm(matrix, vec.unsqueeze(1)).squeeze(1)


def _addmv(c: Tensor, matrix: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    column = c.unsqueeze(-1) if c.dim() else c
    return torch.addmm(column, matrix, vec.unsqueeze(1), beta=beta, alpha=alpha).squeeze(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a.unsqueeze(0), b.unsqueeze(1)).reshape(())


def _addbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The sum over the batch of ``a[i] @ b[i]``: one product over the batch's and the columns' joint length."""
    rows = a.transpose(0, 1).reshape(a.shape[1], -1)
    columns = b.reshape(-1, b.shape[2])
    return torch.addmm(c, rows, columns, beta=beta, alpha=alpha)


def _fused_rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """As ``aten.rms_norm`` composes it, so that a norm has the same bits with and without autograd."""
    dims = list(range(-len(normalized_shape), 0))
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    rstd = torch.rsqrt(wide.pow(2).mean(dims, keepdim=True) + eps)
    y = wide * rstd
    if weight is not None:
        y = y * weight
    return y.to(x.dtype), rstd


def _fused_rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: list[int],
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    dims = list(range(-len(normalized_shape), 0))
    wide_grad, wide = grad.to(rstd.dtype), x.to(rstd.dtype)
    normalised = wide * rstd
    d_input = d_weight = None
    if output_mask[0]:
        weighted = wide_grad if weight is None else wide_grad * weight
        shared = (weighted * normalised).mean(dims, keepdim=True)
        d_input = ((weighted - normalised * shared) * rstd).to(x.dtype)
    if output_mask[1] and weight is not None:
        rows = list(range(x.dim() - len(normalized_shape)))
        product = wide_grad * normalised
        d_weight = (product.sum(rows) if rows else product).to(weight.dtype)
    return d_input, d_weight


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``nn.TransformerEncoderLayer``'s fused inference path, as its ordinary path computes it."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    def attend(x: Tensor) -> Tensor:
        return _self_attention(x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


def _self_attention(
    x: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None,
    mask_type: int | None,
) -> Tensor:
    """Self-attention over ``x`` [N, L, E] as ``F.multi_head_attention_forward`` composes it."""
    batch, length = x.shape[0], x.shape[1]
    q, k, v = _heads_of(F.linear(x, qkv_weight, qkv_bias), num_heads)
    y = scaled_dot_product_attention(q, k, v, _additive(mask, mask_type, batch, length, x.dtype))
    return F.linear(y.transpose(1, 2).reshape(batch, length, embed_dim), proj_weight, proj_bias)


def _heads_of(packed: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values ``[N, heads, L, depth]`` from their joint projection ``[N, L, 3 E]``."""
    return packed.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _additive(mask: Tensor | None, mask_type: int | None, batch: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """The mask types of torch/nn/modules/activation.py, 0 [L, L], 1 [N, L] and 2 [N, heads, L, L], True for hidden."""
    if mask is None:
        return None
    hidden = mask.view(1, 1, length, length) if mask_type == 0 else mask
    hidden = mask.view(batch, 1, 1, length) if mask_type == 1 else hidden
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden.to(torch.bool), float("-inf"))


def _native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention``'s fused inference path, which PyTorch takes for self-attention without weights."""
    if query is not key or key is not value:
        raise UnsupportedOpError(
            "aten._native_multi_head_attention: expected self-attention, got other keys or values. Turn the fused "
            "path off with torch.backends.mha.set_fastpath_enabled(False)."
        )
    if not need_weights:
        y = _self_attention(query, embed_dim, num_head, qkv_weight, qkv_bias, proj_weight, proj_bias, mask, mask_type)
        return y, None  # as PyTorch's
    batch, length = query.shape[0], query.shape[1]
    q, k, v = _heads_of(F.linear(query, qkv_weight, qkv_bias), num_head)
    scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(2, 3)
    if (hidden := _additive(mask, mask_type, batch, length, query.dtype)) is not None:
        scores = hidden + scores
    weights = scores.softmax(-1)
    y = F.linear((weights @ v).transpose(1, 2).reshape(batch, length, embed_dim), proj_weight, proj_bias)
    return y, weights.mean(1) if average_attn_weights else weights


def _never_left_aligned(x: Tensor, mask: Tensor) -> bool:
    """``nn.TransformerEncoder`` then keeps its padded batch instead of making a nested tensor of it."""
    return False


def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    """What is left beside empty tensors comes out as PyTorch lays it out, where Inductor's form keeps its own strides.

    Keys that are appended to an empty cache would come back transposed, and the next step be compiled for them alone.
    """
    if len(tensors) == 1:
        return NotImplemented
    joined = _stock_cat(tensors, dim)
    return joined if joined is NotImplemented else aten.cat.default([joined], dim)


def _first_extremum(arg: Callable[..., Tensor]) -> Callable[..., Any]:
    """max and min over a dim: of equal elements, such as 0.0 and -0.0, the first."""

    def extremum(x: Tensor, dim: int, keepdim: bool = False) -> Any:
        if not x.is_floating_point() or not x.dim():
            return NotImplemented
        indices = arg(x, dim, keepdim=True)
        values = torch.gather(x, dim, indices)
        return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))

    return extremum


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    """Rounded once, as Inductor's own form is, which has no name for what is in between."""
    torch._check_value(
        x.shape[dim] % 2 == 0, lambda: f"glu: expected an even size in dim {dim}, got shape {tuple(x.shape)}"
    )
    half = x.shape[dim] // 2
    a, b = (aten.narrow.default(x, dim, start, half) for start in (0, half))
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return (a.to(wide) * torch.sigmoid(b.to(wide))).to(x.dtype)


def _sort(x: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return torch.sort(x, stable=True, dim=dim, descending=descending)


def _stable_sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Any:
    """Of equal elements the first comes first: another order could follow the batch."""
    return NotImplemented if stable else _sort(x, dim, descending)


def _refuse_attention(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOpError(
            f"{name}: expected torch.nn.functional.scaled_dot_product_attention, got a call of one backend's own op, "
            "whose order belongs to that backend. Call F.scaled_dot_product_attention instead; inside torch.func.vmap, "
            "which makes such a call of it, compute attention as a product, a softmax and a product."
        )

    return refuse


_NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten.mv.default: _mv,
    aten.addmv.default: _addmv,
    aten.dot.default: _dot,
    aten.vdot.default: _dot,
    aten.addbmm.default: _addbmm,
    aten.max.dim: _first_extremum(torch.argmax),
    aten.min.dim: _first_extremum(torch.argmin),
    aten.cat.default: _cat,
    aten.glu.default: _glu,
    aten.native_dropout.default: dropout.native_dropout,
    aten.native_dropout_backward.default: dropout.native_dropout_backward,
    aten._efficientzerotensor.default: aten.zeros.default,  # which second derivatives hold
    torch.ops.bicompile.log_probability.default: log_probability,
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
    aten._foreach_norm.Scalar: foreach.norm,
    aten._fused_rms_norm.default: _fused_rms_norm,
    aten._fused_rms_norm_backward.default: _fused_rms_norm_backward,
    aten._transformer_encoder_layer_fwd.default: _encoder_layer,
    aten._native_multi_head_attention.default: _native_attention,
    aten._nested_tensor_from_mask_left_aligned.default: _never_left_aligned,
    # F.scaled_dot_product_attention never gets this far: bicompile.interception replaces it above autograd.
    **{
        packet.default: _refuse_attention(str(packet))
        for packet in (
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_cudnn_attention,
        )
    },
}


@functools.cache
def decomposition_table() -> dict[OpOverload, Callable[..., Any]]:
    """The table that stands in for Inductor's while one of our graphs is traced."""
    table = dict(select_decomp_table())
    for packet in _KEPT_WHOLE:
        for overload in packet.overloads():
            table.pop(getattr(packet, overload), None)
    for module in (bags, collectives, complexes, convolution, distances, inverses, norms, pooling, resizing, writes):
        table |= module.NORMAL_FORMS
    return table | _NORMAL_FORMS
