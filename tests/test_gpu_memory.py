"""What attention allocates on a GPU: its launching code runs on tensors of the meta device, and no kernel runs.

A kernel cannot allocate, so this is all the memory that there is.  tests/gpu/test_attention.py asks a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bicompile.lowering.attention import gpu, gpu_backward
from bicompile.lowering.attention.order import gpu_order_for
from bicompile.lowering.gpu.device import DeviceKey
from bicompile.lowering.gpu.launch import Launch
from bicompile.lowering.gpu.plans import _PLANS

LENGTH, HEADS, DEPTH = 32768, 4, 128


class Allocated(TorchDispatchMode):
    """The bytes of all storages that are made meanwhile, even if they are freed again."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known:
                self.storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return result

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def gpu_of(capability: tuple[int, int]) -> Iterator[None]:
    """A device that takes the first schedule of all, and launches nothing."""
    device = DeviceKey("", capability, num_sms=132, shared_memory=0, versions="")
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Launch, "__call__", lambda self, device, *tensors: None))
        for module in (gpu, gpu_backward):
            patches.enter_context(mock.patch.object(module, "device_key", lambda index: device))
            patches.enter_context(mock.patch.object(module, "choose", lambda p, candidates, *rest: candidates[0]))
        _PLANS.clear()
        patches.callback(_PLANS.clear)
        yield


def heads(length: int) -> Tensor:
    """[1, HEADS, length, DEPTH]"""
    return torch.empty(1, length, HEADS, DEPTH, dtype=torch.bfloat16, device="meta").transpose(1, 2)


@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.bfloat16], ids=["causal", "bool", "additive"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_prefill_of_32k_tokens_and_its_gradients_hold_no_scores(
    capability: tuple[int, int], mask_dtype: torch.dtype | None
):
    q, k, v, mask = heads(LENGTH), heads(LENGTH), heads(LENGTH), None
    if mask_dtype is not None:
        mask = torch.empty(1, 1, LENGTH, LENGTH, dtype=mask_dtype, device="meta")
    with gpu_of(capability), Allocated() as found:
        out, lse = gpu.sdpa(q, k, v, mask, mask is None, 0.1)
        gpu_backward.sdpa_backward(out, q, k, v, mask, out, lse, mask is None, 0.1, False)
    assert 4 * out.nbytes < found.nbytes < 5 * out.nbytes  # the output, three gradients, and numbers of rows
    assert found.nbytes < LENGTH * LENGTH


@pytest.mark.parametrize("keys", [2048, 32768])
def test_a_decode_step_holds_the_sums_of_its_splits(keys: int):
    q, k, v = heads(1), heads(keys), heads(keys)
    with gpu_of((9, 0)), Allocated() as found:
        out, lse = gpu.sdpa(q, k, v, None, False, 0.1)
    sums = HEADS * gpu_order_for(DEPTH, torch.bfloat16).num_splits(keys) * (DEPTH + 2) * 4
    assert found.nbytes == out.nbytes + lse.nbytes + sums
