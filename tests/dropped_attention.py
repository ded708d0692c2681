"""Attention with dropout as plain PyTorch computes it, in the inputs' dtype and with their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from bicompile.dropout import is_kept


def dropped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, seeds: Tensor, dropout_p: float
) -> Tensor:
    """What ``bicompile::sdpa`` gives for these arguments, but for the order; 0 where a row sees nothing."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    seen = torch.ones(scores.shape, dtype=torch.bool, device=q.device)
    seen = seen.tril() if causal else seen
    first = torch.zeros(q.shape[:3], dtype=torch.int64, device=q.device)
    if mask is not None:
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            seen = seen & (mask > -torch.inf)
            scores = scores + torch.where(seen, mask, 0.0)
        first = seen.int().argmax(-1)
    some = seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen & some, -torch.inf).softmax(-1) * seen
    kept = is_kept(seeds[..., None], torch.arange(k.shape[2], device=q.device) - first[..., None], dropout_p)
    inverse = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return torch.where(kept, weights * inverse, 0.0) @ v
