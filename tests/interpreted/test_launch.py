"""``Launch`` hands a kernel its tensors, integers and constants in that order, the first time and later."""

from __future__ import annotations

import contextlib
import ctypes
import struct
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from bicompile.lowering.gpu import driver, launch
from bicompile.lowering.gpu.launch import INTERPRETED, Launch, static_launch


@triton.jit
def _scale_kernel(x_ptr, out_ptr, n, factor: tl.constexpr, BLOCK: tl.constexpr):
    """``out[i] = x[i] * factor`` for ``i < n``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n) * factor, mask=i < n)


def test_arguments_arrive_in_order_and_again():
    assert INTERPRETED
    scale = Launch(_scale_kernel, (3,), integers=(11,), constants=(3, 4), warps=1)
    for start in (0, 5):
        x, out = torch.arange(start, start + 12.0), torch.zeros(12)
        scale(0, x, out)
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
    name = special.pop("name", "kernel")
    metadata |= {"global_scratch_size": 0, "profile_scratch_size": 0, **special}
    runner = mock.Mock()
    compiled = mock.MagicMock(src=SimpleNamespace(signature=types), metadata=SimpleNamespace(**metadata))
    compiled.name = name
    compiled.__getitem__.return_value = runner
    return compiled, runner


ARGUMENTS = (1, 11, 0.5, 128)


def test_what_is_compiled_in_is_left_out():
    compiled, _ = _compiled()
    x, out = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    with mock.patch.object(torch._C, "_StaticCudaLauncher", create=True) as launcher:
        static_launch(compiled, 77, (3, 2, 1), (x, None, out, *ARGUMENTS), 3)(9, (x, None, out))
    addresses = (x.data_ptr(), out.data_ptr())
    launcher._launch_kernel.assert_called_once_with(77, 3, 2, 1, 4, 64, "OOifOO", (*addresses, 11, 0.5, None, None), 9)


@contextlib.contextmanager
def _gpu(**special):
    """A launch on a GPU, what loads its kernel, and what launches it: PyTorch, or Triton for what is ``special``."""
    compiled, runner = _compiled(**special)
    scale = Launch(mock.MagicMock(), (3, 2), ARGUMENTS[:3], ARGUMENTS[3:], 4)
    scale.kernel.warmup.return_value = compiled
    load = mock.Mock(return_value=("module", 77, 32, 0, 1024))
    active = SimpleNamespace(utils=SimpleNamespace(load_binary=load))
    with (
        mock.patch.object(torch._C, "_StaticCudaLauncher", create=True) as launcher,
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 9, create=True),
        mock.patch("triton.runtime.driver", SimpleNamespace(active=active)),
        mock.patch.object(launch, "device_key", lambda index: SimpleNamespace(shared_memory=1000)),
        mock.patch.object(launch, "driver_launch", lambda *arguments: None),
        mock.patch.object(launch, "INTERPRETED", False),
    ):
        yield scale, load, launcher._launch_kernel, runner


def test_a_kernel_is_compiled_and_loaded_once_and_all_launches_are_made_alike():
    x, out = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    with _gpu(name="scale") as (scale, load, launched, by_triton):
        for _ in range(2):
            scale(0, x, None, out)
        again = Launch(scale.kernel, (5,), ARGUMENTS[:3], ARGUMENTS[3:], 4)
        again(0, x, None, out)
        load.assert_called_once_with("scale", scale.kernel.warmup.return_value.kernel, 64, 0)
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    assert scale.kernel.warmup.call_args_list[0] == mock.call(x, None, out, *ARGUMENTS, grid=(3, 2, 1), **options)
    assert [call.args[:4] for call in launched.call_args_list] == [(77, 3, 2, 1), (77, 3, 2, 1), (77, 5, 1, 1)]
    by_triton.assert_not_called()


def test_a_kernel_that_needs_more_shared_memory_than_there_is_raises():
    with _gpu(shared=1001) as (scale, load, launched, _), pytest.raises(OutOfResources, match="shared memory"):
        scale(0, torch.zeros(4), None, torch.zeros(4))
    load.assert_not_called()
    launched.assert_not_called()


@pytest.mark.parametrize("special", [{"launch_pdl": True}, {"num_ctas": 2}, {"global_scratch_size": 16}], ids=str)
def test_a_kernel_that_asks_for_more_is_launched_by_triton(special):
    with _gpu(**special) as (scale, _, launched, by_triton):
        for tensors in (("x", None, "out"), ("y", None, "into")):
            scale(0, *tensors)
    launched.assert_not_called()
    wanted = [mock.call(*tensors, *ARGUMENTS, stream=9) for tensors in (("x", None, "out"), ("y", None, "into"))]
    assert by_triton.call_args_list == wanted


class Driver:
    """A driver that knows kernels whose parameters have ``sizes``, and notes what they are launched with."""

    def __init__(self, *sizes, error=0):
        self.sizes, self.error, self.encoded, self.launched, self.entered = sizes, error, [], [], []

    def cuFuncGetParamInfo(self, function, index, offset, size):  # noqa: N802
        if function != 77 or index >= len(self.sizes):
            return 1
        ctypes.c_size_t.from_address(size).value = self.sizes[index]
        return 0

    def cuTensorMapEncodeTiled(self, at, kind, rank, base, shape, strides, block, steps, *rest):  # noqa: N802
        assert at % 64 == 0
        wide = [
            list((ctypes.c_uint64 * count).from_address(array)) for array, count in ((shape, rank), (strides, rank - 1))
        ]
        small = [list((ctypes.c_uint32 * rank).from_address(array)) for array in (block, steps)]
        self.encoded.append((kind, *wide, *small, *rest))
        return self.cuTensorMapReplaceAddress(at, base)

    def cuTensorMapReplaceAddress(self, at, base):  # noqa: N802
        ctypes.c_uint64.from_address(at).value = base
        return 0

    def cuDeviceGet(self, handle, ordinal):  # noqa: N802
        ctypes.c_int.from_address(handle).value = 100 + ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context, handle):  # noqa: N802
        ctypes.c_uint64.from_address(context).value = 0x2000 if handle == 102 else 0
        return 0

    def cuCtxSetCurrent(self, context):  # noqa: N802
        self.entered.append(context)
        self.error = 0
        return 0

    def cuLaunchKernelEx(self, at, function, parameters, extra):  # noqa: N802
        config = driver._Config.from_address(at)
        pointers = (ctypes.c_uint64 * len(self.sizes)).from_address(parameters)
        values = [ctypes.string_at(pointer, min(size, 8)) for pointer, size in zip(pointers, self.sizes, strict=True)]
        attributes = (driver._Attribute * config.num_attributes).from_address(config.attributes)
        pdl = [(a.id, a.value[0]) for a in attributes]
        grid = (config.grid_x, config.grid_y, config.grid_z, config.block_x, config.block_y, config.block_z)
        self.launched.append((function, grid, config.shared_bytes, config.stream, pdl, values))
        return self.error


MAP = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 64], "fp4_padded": False}


def _mapped(base):
    return SimpleNamespace(base=base, shape=[5, 128], strides=[256, 1], padding="zero")


@pytest.mark.parametrize("pdl", [False, True])
def test_the_driver_is_given_addresses_numbers_and_tensor_maps(pdl: bool):
    compiled, _ = _compiled(launch_pdl=pdl, tensordesc_meta=[MAP])
    compiled.src.signature["mask"] = "tensordesc<bf16[1,64]>"
    library = Driver(8, 128, 4, 4, 8, 8, 8, 4, 4, 8, 8)
    x, mapped, out = (torch.zeros(4) for _ in range(3))
    with mock.patch.object(driver, "driver", lambda: library):
        again = driver.driver_launch(compiled, 77, (3, 2, 1), (x, _mapped(mapped), out, *ARGUMENTS))
    assert library.encoded == [(9, [128, 5], [512], [64, 1], [1, 1], 0, 3, 2, 0)]
    tensors = [torch.ones(4) for _ in range(3)]
    again(9, tensors)
    again(8, (x, mapped, out))
    for (function, grid, shared, stream, attributes, values), given, wanted in zip(
        library.launched, (tensors, (x, mapped, out)), (9, 8), strict=True
    ):
        assert (function, grid, shared, stream) == (77, (3, 2, 1, 128, 1, 1), 64, wanted)
        assert attributes == ([(6, 1)] if pdl else [])
        addresses = [struct.pack("<Q", t.data_ptr()) for t in given]
        numbers = [struct.pack("<iiqq", 5, 128, 256, 1)[at : at + n] for at, n in ((0, 4), (4, 4), (8, 8), (16, 8))]
        scalars = [struct.pack("<i", 11), struct.pack("<f", 0.5), bytes(8), bytes(8)]
        assert values == [addresses[0], addresses[1], *numbers, addresses[2], *scalars]


def test_a_thread_that_has_not_used_the_gpu_enters_its_context():
    compiled, _ = _compiled()
    library = Driver(8, 8, 4, 4, 8, 8, error=201)
    x, out = torch.zeros(4), torch.zeros(4)
    with mock.patch.object(driver, "driver", lambda: library):
        again = driver.driver_launch(compiled, 77, (1, 1, 1), (x, None, out, *ARGUMENTS))
    on_third = mock.Mock(data_ptr=x.data_ptr, get_device=lambda: 2)
    again(9, (on_third, None, out))
    assert library.entered == [0x2000] and len(library.launched) == 2
    again(9, (on_third, None, out))
    assert library.entered == [0x2000] and len(library.launched) == 3


def test_threads_do_not_mix_their_addresses():
    compiled, _ = _compiled()
    library = Driver(8, 8, 4, 4, 8, 8)
    with mock.patch.object(driver, "driver", lambda: library):
        again = driver.driver_launch(compiled, 77, (1, 1, 1), (torch.zeros(4), None, torch.zeros(4), *ARGUMENTS))
    pairs = [tuple(SimpleNamespace(data_ptr=lambda n=n: n) for n in (16 * i, 16 * i + 8)) for i in range(4)]

    def launch_often(x, out):
        for _ in range(300):
            again(9, (x, None, out))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=launch_often, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    seen = [tuple(int.from_bytes(value, "little") for value in values[:2]) for *_, values in library.launched]
    assert {pair: seen.count(pair) for pair in seen} == {(16 * i, 16 * i + 8): 300 for i in range(4)}


def test_a_launch_that_the_driver_refuses_raises():
    compiled, _ = _compiled(name="scale")
    library = Driver(8, 8, 4, 4, 8, 8, error=719)
    x, out = torch.zeros(4), torch.zeros(4)
    with mock.patch.object(driver, "driver", lambda: library):
        again = driver.driver_launch(compiled, 77, (1, 1, 1), (x, None, out, *ARGUMENTS))
    with pytest.raises(RuntimeError, match="scale: the CUDA driver refused the launch with error 719"):
        again(0, (x, None, out))


@pytest.mark.parametrize(
    ("sizes", "types", "special"),
    [
        ((8, 8, 4, 4, 8), {}, {}),  # the driver has one parameter fewer
        ((8, 8, 8, 4, 8, 8), {}, {}),  # and here a larger one
        ((8, 8, 4, 4, 8, 8), {"n": "u7"}, {}),
        ((8, 8, 4, 4, 8, 8), {}, {"num_ctas": 2}),
        ((8, 8, 4, 4, 8, 8), {}, {"launch_cooperative_grid": True}),
        ((8, 8, 4, 4, 8, 8), {}, {"profile_scratch_size": 16}),
        ((8, 128, 4, 4, 8, 8, 8, 4, 4, 8, 8), {"mask": "tensordesc<bf16[1,64]>"}, {"tensordesc_meta": None}),
    ],
)
def test_kernels_whose_parameters_are_not_understood_are_left_to_triton(sizes, types, special):
    compiled, _ = _compiled(**special)
    compiled.src.signature.update(types)
    values = (torch.zeros(4), _mapped(torch.zeros(4)), torch.zeros(4), *ARGUMENTS)
    with mock.patch.object(driver, "driver", lambda: Driver(*sizes)):
        assert driver.driver_launch(compiled, 77, (1, 1, 1), values) is None
    with mock.patch.object(driver, "driver", lambda: None):
        assert driver.driver_launch(_compiled()[0], 77, (1, 1, 1), values) is None
