"""Compare by bits: ``torch.equal`` takes -0.0 for 0.0 and rejects NaN for NaN, so it is not a comparison of bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .structure import leaves


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two tensors differ: totals, and the index, values and bits of the first element that does."""

    index: tuple[int, ...]
    expected: object
    got: object
    expected_bits: str
    got_bits: str
    elements: int
    bits: int


def same_bits(a: Any, b: Any) -> bool:
    """True if ``a`` and ``b`` hold the same bits.

    Takes tensors of any dtype, numbers, and lists, tuples, mappings, dataclasses and plain objects of them, nested.
    Tensors must agree in shape, dtype and every bit: -0.0 is not 0.0, and a NaN is only the NaN with its payload.
    Strides, storage offset, device and ``requires_grad`` do not count, nor does list against tuple.
    """
    left, right = dict(leaves(a)), dict(leaves(b))
    return left.keys() == right.keys() and all(_same_leaf(left[path], right[path]) for path in left)


def differing_bits(a: Tensor, b: Tensor) -> int:
    """Number of bits in which two tensors of one shape and dtype differ.

    Raises:
        ValueError: the shapes or dtypes are not the same.
    """
    found = difference(a, b)
    return 0 if found is None else found.bits


def difference(a: Tensor, b: Tensor) -> Difference | None:
    """The difference between ``a`` (expected) and ``b`` (got), or None if they have the same bits.

    Raises:
        ValueError: the shapes or dtypes are not the same.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            "difference: expected two tensors of one shape and dtype, "
            f"got {_describe(a)} and {_describe(b)}; ask same_bits first"
        )
    left, right = _bytes_of(a), _bytes_of(b)
    flipped = (left ^ right).reshape(-1, a.element_size())
    positions = flipped.any(dim=1).nonzero()
    if positions.numel() == 0:
        return None
    first = int(positions[0])
    bits = sum(int(((flipped >> shift) & 1).sum()) for shift in range(8))
    return Difference(
        index=_unravel(first, tuple(a.shape)),
        expected=_element(a, first),
        got=_element(b, first),
        expected_bits=_hex(left, first, a.element_size()),
        got_bits=_hex(right, first, a.element_size()),
        elements=len(positions),
        bits=bits,
    )


def _same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
            return False
        return torch.equal(_bytes_of(a), _bytes_of(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, float | complex):
        wide = torch.complex128 if isinstance(a, complex) else torch.float64
        return _same_leaf(torch.tensor(a, dtype=wide), torch.tensor(b, dtype=wide))
    return bool(a == b)


def _bytes_of(t: Tensor) -> Tensor:
    """The elements of ``t`` in order, as a flat uint8 tensor on the CPU."""
    if t.layout is not torch.strided:
        raise TypeError(
            f"same_bits: expected a strided tensor, got layout {t.layout}; compare its parts or .to_dense()"
        )
    if t.device.type == "meta":
        raise TypeError("same_bits: expected a tensor with data, got one on the meta device")
    plain = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # Not reshape(-1): a dim of size 1 may keep a stride that view(dtype) rejects.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))


def _element(t: Tensor, flat: int) -> object:
    return t.detach().resolve_conj().resolve_neg().reshape(-1)[flat].item()


def _hex(raw: Tensor, position: int, size: int) -> str:
    """The bits of one element, most significant byte first, as ``0x...``."""
    own = raw[position * size : (position + 1) * size].tolist()
    return "0x" + bytes(reversed(own)).hex()
