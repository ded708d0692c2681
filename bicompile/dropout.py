"""Dropout whose mask follows the numbers that it falls on, and not their place in the batch.

PyTorch draws a mask from one generator for the whole batch, so what is dropped of a sample depends on where it stands
among others.  Here one seed is drawn for a call, whatever the batch; each vector of the input (its last dim) makes a
key of that seed and of its own bits; and whether an element is dropped follows from the key and the element's place in
the vector, by a counter-based generator: the output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014).  So a sample keeps its mask in every batch, at every place in it, and
with any padding beside it; ``torch.manual_seed`` makes a run repeatable as ever; and vectors that are equal to the bit
share a mask within one call.

All of it is arithmetic of integers, which has the same bits in whatever order it is done.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
RESOLUTION = 24
"""Bits of a random number; probabilities are rounded to them."""


def threshold_of(p: float) -> int:
    """An element is dropped if its random number, of RESOLUTION bits, is below this."""
    return round(p * 2**RESOLUTION)


def is_kept(keys: Tensor, places: Tensor, p: float) -> Tensor:
    """Whether the element at each of ``places`` is kept, bool; int64 ``keys`` and ``places`` broadcast."""
    return _shifted(_mixed(keys + _jump(places)), 64 - RESOLUTION) >= threshold_of(p)


def keys_of(x: Tensor, dims: int = 1) -> Tensor:
    """A key for each vector of ``x``, int64: of its bits over the last ``dims`` dims, and of a seed drawn for the call.

    Shape: that of ``x`` with these dims as 1.
    """
    over = list(range(x.dim() - dims, x.dim()))
    with torch.no_grad():
        # Not every NaN has the same bits, and which one a row holds nobody promises.
        bits = torch.where(x.isnan(), 0.0, x).detach().view(_BITS[x.element_size()]).to(torch.int64)
        places = torch.zeros((), dtype=torch.int64, device=x.device)
        for dim in over:
            own = torch.arange(x.shape[dim], device=x.device).view(-1, *(1,) * (x.dim() - dim - 1))
            places = _mixed(places + _jump(own))
        mixed = _mixed(bits + places)
        seed = torch.randint(0, 2**62, (), dtype=torch.int64, device=x.device)
        return _mixed((mixed.sum(over, keepdim=True) if over else mixed) + seed)


def native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """``aten.native_dropout``, which ``torch.nn.functional.dropout`` is: the output, and what is kept, bool.

    Args:
        x: [..., N] of any real floating dtype.
        p: the probability with which an element is dropped, 0 to 1.
        train: whether to drop at all.
    """
    if p == 0.0 or train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = _kept(x, p, features=False)
    return x * kept * _scale_of(p), kept


def native_dropout_backward(grad: Tensor, kept: Tensor, scale: float) -> Tensor:
    """The gradient of ``native_dropout``'s input, rounded as its output is."""
    return grad * kept * scale


def feature_dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """``dropout1d``, ``dropout2d``, ``dropout3d``: whole channels of [N, C, ...], by keys of what they hold."""
    if not _drops(x, p, train):
        return x
    return x * _kept(x, p, features=True) * _scale_of(p)


_SELU_FLOOR = -1.7580993408473766
"""What SELU tends to for numbers far below 0, which alpha dropout puts where it drops."""


def alpha_dropout(x: Tensor, p: float, train: bool, *, features: bool = False) -> Tensor:
    """``torch.nn.functional.alpha_dropout``, which keeps mean 0 and variance 1; ``features``: of whole channels."""
    if not _drops(x, p, train):
        return x
    if p == 1.0:
        return x * torch.zeros((), dtype=x.dtype, device=x.device)
    scale = 1.0 / math.sqrt((1.0 - p) * (1.0 + p * _SELU_FLOOR**2))
    kept = _kept(x, p, features).to(x.dtype)
    return x * kept * scale + ((1.0 - kept) * (_SELU_FLOOR * scale) - p * _SELU_FLOOR * scale)


def _drops(x: Tensor, p: float, train: bool) -> bool:
    if not 0.0 <= p <= 1.0:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
    return p > 0.0 and train and x.numel() > 0


def _scale_of(p: float) -> float:
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _kept(x: Tensor, p: float, features: bool) -> Tensor:
    """Where ``x`` is kept, bool: for each element or, with ``features``, each channel."""
    if not features:
        keys = keys_of(x, min(x.dim(), 1))
        places = torch.arange(x.shape[-1] if x.dim() else 1, device=x.device).view(x.shape[-1:])
    else:
        if x.dim() < 2:
            raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
        keys = keys_of(x, x.dim() - 2)
        places = torch.arange(x.shape[1], device=x.device).view(-1, *(1,) * (x.dim() - 2))
    return is_kept(keys, places, p)


def _jump(places: Tensor) -> Tensor:
    """How far ``places + 1`` steps move SplitMix64's state."""
    # The exclusive or changes nothing, but that Inductor does not take this for arithmetic of indices, in 32 bits.
    return ((places ^ 0) + 1) * _signed(_GOLDEN)


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's output function of int64, which wrap."""
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, _SHIFTS[-1])


def _shifted(z: Tensor, by: int) -> Tensor:
    """``z >> by`` of int64 as if they had no sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    """The int64 of the same bits."""
    return word - (1 << 64) if word >> 63 else word
