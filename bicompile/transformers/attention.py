"""The attention function behind ``attn_implementation="batch_invariant"``.

Keys are counted from the first one that a query sees, as in ``lowering.attention.order``, so left and right padding,
unused slots of a static cache, a rolled sliding window and the neighbours of a packed sequence cannot show.  Boolean
masks, additive masks and position biases (ALiBi, T5), soft caps (Gemma 2), attention sinks (gpt-oss) and dropout are
covered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..covered import covered
from ..dropout import keys_of
from ..lowering.attention.op import scaled_dot_product_attention

_MINUS_INFINITY = float("-inf")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the signature that transformers' models call.

    Args:
        module: the attention layer; its ``is_causal`` counts where ``is_causal`` is None.
        query: ``[batch, heads, queries, depth]``.
        key: ``[batch, kv_heads, keys, depth]``, ``kv_heads`` a divisor of ``heads``.
        value: ``[batch, kv_heads, keys, value_depth]``.
        attention_mask: broadcasts to ``[batch, heads, queries, keys]``; True or 0 where a query sees a key.
        dropout: the probability with which a weight is dropped; see ``bicompile.dropout``.
        scaling: factor of the scores; ``depth ** -0.5`` if None.
        is_causal: whether several queries without a mask see only the keys up to their own.
        position_bias: added to the scores, broadcasts like the mask.
        softcap: scores become ``softcap * tanh(score / softcap)`` before mask and bias.
        s_aux: ``[heads]``, one more logit for each head that takes its share of the weight and adds nothing.
        kwargs: what else a model passes on.  ``position_ids`` ``[batch or 1, queries]`` that start again at 0 keep the
            sequences of a packed row apart, also in models whose mask does not.

    Returns:
        ``[batch, queries, heads, value_depth]`` and None for the weights, which are never formed.
    """
    if attention_mask is not None and key.shape[2] > attention_mask.shape[-1] > 1:
        # A sliding cache that may be cropped, of an assistant model, returns keys in front that no query sees.
        key, value = (t[:, :, -attention_mask.shape[-1] :] for t in (key, value))
    queries, keys = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if causal and (positions := kwargs.get("position_ids")) is not None:
        attention_mask = _unpacked(attention_mask, positions, queries, keys)
    # Sizes last, since comparing them specialises a graph; and a plain bool, which a comparison of sizes may not be.
    causal = True if causal and attention_mask is None and queries > 1 else False
    if causal and keys > queries:
        # A prefill into an empty static cache: the slots behind the queries are unused.
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = position_bias[..., :queries] if position_bias is not None else None
    if position_bias is not None:
        attention_mask, causal = _biased(position_bias, attention_mask, causal), False
    with covered():
        out = attend(query, key, value, attention_mask, causal, scaling, softcap, s_aux, dropout)
    return out.transpose(1, 2).contiguous(), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``[batch, heads, queries, value_depth]``: attention with an optional soft cap and optional sinks.

    Numerics: the order of ``lowering.attention``.  A soft cap forms the scores, in fp32.  Sinks scale the attention
    without them, rounded to the input type, by ``sigmoid(lse - sink)``.  Under autocast, queries, keys and values are
    cast to its type, as PyTorch's attention casts them, and the rest is as it is without.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # Rotary embeddings hand on wider queries and keys than values.
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
        with torch.autocast(device, enabled=False):
            return attend(query, key, value, mask, is_causal, scale, softcap, sinks, dropout)
    if softcap is None and sinks is None:
        gqa = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, mask, dropout, is_causal, scale=scale, enable_gqa=gqa)
    seeds = keys_of(query).squeeze(-1) if dropout > 0.0 else None  # of the queries before a cap makes them all alike
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if softcap is not None:
        query, key, mask = _capped(query, key, mask, is_causal, scale, softcap)
        is_causal, scale = False, 1.0
    if sinks is None:
        return torch.ops.bicompile.sdpa(query, key, value, mask, is_causal, scale, None, seeds, dropout)[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, sinks)):
        return _WithSinks.apply(query, key, value, mask, sinks, is_causal, scale, seeds, dropout)
    return _with_sinks(query, key, value, mask, sinks, is_causal, scale, seeds, dropout)[0]


def _unpacked(mask: Tensor | None, positions: Tensor, queries: int, keys: int) -> Tensor | None:
    """``mask``, and no query sees a key of another sequence of its row, if ``positions`` say that there are several."""
    if positions.dim() != 2 or queries == 1 or queries != keys:  # with a cache, a row is one sequence
        return mask
    starts = (positions[:, 1:] == 0) & (positions[:, :-1] != 0)
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return mask
    sequence = F.pad(starts.long().cumsum(1), (1, 0))
    same = sequence[:, None, :, None] == sequence[:, None, None, :]
    if mask is None:
        return same.tril()
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, _MINUS_INFINITY)


def _biased(bias: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The additive mask that is ``bias`` where a query sees a key."""
    if mask is None and is_causal:
        mask = bias.new_ones(bias.shape[-2:], dtype=torch.bool).tril()
    if mask is None:
        return bias
    return torch.where(mask, bias, _MINUS_INFINITY) if mask.dtype == torch.bool else bias + mask


def _capped(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of depth 1 that score 0, and an additive mask that holds the capped and masked scores."""
    batch, heads, queries, depth = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    # The heads of a group lie one after the other and share their keys: one product for each group.
    grouped = query.to(wide).reshape(batch, kv_heads, -1, depth)
    scores = (grouped @ key.to(wide).transpose(2, 3)).view(batch, heads, queries, keys)
    scores = torch.tanh(scores * (scale / softcap)) * softcap
    if is_causal:
        mask = scores.new_ones(queries, keys, dtype=torch.bool).tril()
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask == _MINUS_INFINITY
        biased = scores if mask.dtype == torch.bool else scores + mask
        scores = biased.masked_fill(hidden, _MINUS_INFINITY)  # also where a hidden key scores NaN
    return query.new_zeros(batch, heads, queries, 1), key.new_zeros(batch, kv_heads, keys, 1), scores


def _with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor,
    is_causal: bool,
    scale: float,
    seeds: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The attention with sinks; the attention without, its lse, and the share that the sink leaves it (in fp32).

    With ``s`` the sum of ``exp(score)`` over the keys, the weights' denominator grows from ``s`` to
    ``s + exp(sink)``, so the output shrinks by ``s / (s + exp(sink)) = sigmoid(log(s) - sink)``.
    """
    plain, lse = torch.ops.bicompile.sdpa(query, key, value, mask, is_causal, scale, None, seeds, dropout)
    share = torch.sigmoid(lse - sinks.to(lse.dtype).view(-1, 1))
    return (plain * share.unsqueeze(-1)).to(query.dtype), plain, lse, share


class _WithSinks(torch.autograd.Function):
    """``_with_sinks`` with gradients, also through the lse."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        sinks, ctx.is_causal, ctx.scale, seeds, ctx.dropout = rest
        out, plain, lse, share = _with_sinks(query, key, value, mask, *rest)
        ctx.save_for_backward(query, key, value, mask, sinks, plain, lse, share, seeds)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, sinks, plain, lse, share, seeds = ctx.saved_tensors
        wide = grad.to(share.dtype)
        d_lse = (wide * plain).sum(-1) * (share * (1 - share))
        # One more column carries the lse's gradient: it adds d_lse to every score's gradient, P * (dP - grad . out),
        # since -(-d_lse * 1) = d_lse, and nothing to dP, since its value is 0, dropped or not.
        of_plain = (wide * share.unsqueeze(-1)).to(grad.dtype)
        of_plain = torch.cat([of_plain, -d_lse.unsqueeze(-1).to(grad.dtype)], dim=-1)
        widened = torch.cat([plain, torch.ones_like(plain[..., :1])], dim=-1)
        values = torch.cat([value, torch.zeros_like(value[..., :1])], dim=-1)
        needs_mask = ctx.needs_input_grad[3]
        dq, dk, dv, dmask = torch.ops.bicompile.sdpa_backward(
            of_plain, query, key, values, mask, widened, lse, ctx.is_causal, ctx.scale, needs_mask, seeds, ctx.dropout
        )
        d_sinks = -d_lse.sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv[..., :-1], dmask if needs_mask else None, d_sinks, None, None, None, None
