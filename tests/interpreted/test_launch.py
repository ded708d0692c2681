"""``Launch`` hands a kernel its tensors, integers and constants in that order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bicompile.lowering.gpu.launch import INTERPRETED, Launch


@triton.jit
def _scale_kernel(x_ptr, out_ptr, n, factor: tl.constexpr, BLOCK: tl.constexpr):
    """``out[i] = x[i] * factor`` for ``i < n``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * factor, mask=i < n)


def test_arguments_arrive_in_order_and_again():
    assert INTERPRETED
    launch = Launch(_scale_kernel, (3,), integers=(11,), constants=(3, 4), warps=1)
    for start in (0, 5):
        x, out = torch.arange(start, start + 12.0), torch.zeros(12)
        launch(0, x, out)
        assert out.tolist() == [*(3 * x[:11]).tolist(), 0.0]
