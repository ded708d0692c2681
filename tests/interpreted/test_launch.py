"""``Launch`` hands a kernel its tensors, integers and constants in that order."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from bicompile.lowering.gpu.launch import INTERPRETED, Launch, checked, relaunch


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


def _compiled(**special):
    """A compiled kernel of two addresses, a number that is 1, a size, a factor and a constant."""
    types = {
        "x": "*fp32",
        "mask": "constexpr",
        "out": "*bf16",
        "one": "constexpr",
        "n": "i32",
        "f": "fp32",
        "B": "constexpr",
    }
    metadata = {"num_warps": 4, "shared": 64, "launch_pdl": False, "launch_cooperative_grid": False, "num_ctas": 1}
    metadata |= {"global_scratch_size": 0, "profile_scratch_size": 0, **special}
    runner = mock.Mock()
    compiled = mock.MagicMock(src=SimpleNamespace(signature=types), metadata=SimpleNamespace(**metadata), function=77)
    compiled.__getitem__.return_value = runner
    return compiled, runner


def test_later_launches_leave_out_what_is_compiled_in():
    compiled, _ = _compiled()
    x, out = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    with mock.patch.object(torch._C, "_StaticCudaLauncher", create=True) as launcher:
        relaunch(compiled, (3, 2, 1), (x, None, out), (1, 11, 0.5, 128))(9, (x, None, out))
    addresses = (x.data_ptr(), out.data_ptr())
    launcher._launch_kernel.assert_called_once_with(77, 3, 2, 1, 4, 64, "OOifOO", (*addresses, 11, 0.5, None, None), 9)


@pytest.mark.parametrize("special", [{"launch_pdl": True}, {"num_ctas": 2}, {"global_scratch_size": 16}], ids=str)
def test_a_kernel_that_asks_for_more_is_launched_by_triton(special):
    compiled, runner = _compiled(**special)
    with mock.patch.object(torch._C, "_StaticCudaLauncher", create=True) as launcher:
        relaunch(compiled, (3, 2, 1), ("x", None, "out"), (1, 11, 0.5, 128))(9, ("y", None, "into"))
    launcher._launch_kernel.assert_not_called()
    runner.assert_called_once_with("y", None, "into", 1, 11, 0.5, 128, stream=9)


def test_a_check_that_failed_is_made_again_and_one_that_passed_is_not():
    calls = []

    def check(op, x):
        calls.append(x.shape)
        torch._check(x.dim() == 1, lambda: f"{op}: one dim")

    for x in (torch.zeros(2), torch.ones(2), torch.zeros(3), torch.zeros(3, dtype=torch.int32)):
        checked(check, "op", x)
    assert calls == [(2,), (3,), (3,)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="op: one dim"):
            checked(check, "op", torch.zeros(2, 2))
    assert calls[3:] == [(2, 2), (2, 2)]
