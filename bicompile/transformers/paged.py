"""Attention over the paged cache of continuous batching: ``attn_implementation="paged|batch_invariant"``.

A step's tokens lie end to end, those of one request after those of another.  They are laid out as a batch with a row
for each request, so that a request's bits are those that it has alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..covered import covered
from .attention import attend


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the requests of one step, each causal over its own keys, the last query seeing the last key.

    Args:
        module: the attention layer, of which ``layer_idx`` is read.
        query: ``[1, heads, tokens, depth]``; of key and value likewise the new tokens.
        attention_mask: not used; transformers makes none for this implementation.
        sliding_window: how many keys a query sees, its own included; by default the layer's, or all.
        dropout, scaling, softcap, s_aux: as in ``attention_forward``.
        kwargs: of what continuous batching passes: ``cache``, ``read_index``, ``write_index``, ``cu_seq_lens_q``,
            ``cu_seq_lens_k``, ``max_seqlen_q``, ``max_seqlen_k``.

    Returns:
        ``[1, tokens, heads, value_depth]``, and None for the weights.

    Raises:
        ValueError: there is no paged cache: the model was not called by ``generate_batch``.
    """
    cache = kwargs.get("cache")
    if cache is None:
        raise ValueError(
            "paged|batch_invariant: expected the paged cache of generate_batch(), got none; use "
            'attn_implementation="batch_invariant" for generate() and forward()'
        )
    window = sliding_window or getattr(module, "sliding_window", None)
    starts_q, starts_k, longest_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], kwargs["max_seqlen_k"]
    if isinstance(starts_k, dict):
        kind = "full_attention" if window is None else "sliding_attention"
        starts_k, longest_k = starts_k[kind], longest_k[kind]
    # [keys, kv_heads, depth]: cached ones and new ones, request after request
    key, value = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=kwargs["read_index"],
        write_index=kwargs["write_index"],
    )
    with covered():
        rows = _Rows(starts_q, kwargs["max_seqlen_q"])
        of_keys = _Rows(starts_k, longest_k)
        out = attend(
            rows.spread(query[0].transpose(0, 1)).transpose(1, 2),
            of_keys.spread(key).transpose(1, 2),
            of_keys.spread(value).transpose(1, 2),
            _mask(rows, of_keys, window),
            is_causal=False,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            dropout=dropout,
        )
        return rows.gather(out.transpose(1, 2), query.shape[2]).unsqueeze(0), None


class _Rows:
    """Sequences that lie end to end, and the same as rows of a batch, padded on the right to ``longest``."""

    def __init__(self, starts: Tensor, longest: int) -> None:
        self.starts = starts.long()  # [requests + 1]
        self.lengths = self.starts[1:] - self.starts[:-1]
        self.columns = torch.arange(longest, device=starts.device)

    def spread(self, flat: Tensor) -> Tensor:
        """``[tokens, ...]`` as ``[requests, longest, ...]``; what lies in the padding is some token or other."""
        index = self.starts[:-1, None] + self.columns
        return flat[index.clamp(max=max(flat.shape[0] - 1, 0))]

    def gather(self, rows: Tensor, tokens: int) -> Tensor:
        """The inverse of ``spread``; tokens behind the last sequence, which pad a step, get some value or other."""
        token = torch.arange(tokens, device=rows.device)
        request = torch.searchsorted(self.starts[1:], token, right=True).clamp(max=rows.shape[0] - 1)
        return rows[request, (token - self.starts[request]).clamp(max=rows.shape[1] - 1)]


def _mask(rows: _Rows, of_keys: _Rows, window: int | None) -> Tensor:
    """``[requests, 1, queries, keys]``, True where a query sees a key; the last query's own key is the last."""
    own = (of_keys.lengths - rows.lengths)[:, None, None] + rows.columns[:, None]
    seen = (of_keys.columns <= own) & (of_keys.columns < of_keys.lengths[:, None, None])
    if window is not None:
        seen = seen & (of_keys.columns > own - window)
    return seen.unsqueeze(1)
