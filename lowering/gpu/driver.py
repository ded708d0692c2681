"""Launching a kernel by the CUDA driver, for those whose launch by Triton takes longer than they do.

Triton makes tensor maps anew for every launch, and looks through all arguments.  Here parameters are laid out once, and
a launch writes nothing but addresses.  The driver says how large it takes each parameter to be: a kernel of which that
is not what is laid out here is left to Triton.

Source: the CUDA driver API, sections on execution control and on tensor map object management.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_WARP = 32
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_MAX_PARAMETERS = 1024
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_SERIALIZED = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_PROMOTE_128_BYTES = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
_HOST_TYPE = {8: 10, 9: 8, 10: 9}
"""Types of elements that tensor maps on the device, in whose numbers Triton speaks, number otherwise."""


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``."""

    _fields_ = [("id", ctypes.c_uint32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z")),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint32),
    ]


@functools.cache
def driver() -> Any:
    """The driver's library, whose calls keep the GIL as they are short; None if missing or older than CUDA 12.4."""
    try:
        library = ctypes.PyDLL("libcuda.so.1")
        pointer, number = ctypes.c_void_p, ctypes.c_uint32
        library.cuCtxSetCurrent.argtypes = [pointer]
        library.cuDeviceGet.argtypes = library.cuDevicePrimaryCtxRetain.argtypes = [pointer, ctypes.c_int]
        library.cuFuncGetParamInfo.argtypes = [pointer, ctypes.c_size_t, pointer, pointer]
        library.cuLaunchKernelEx.argtypes = [pointer] * 4
        library.cuTensorMapReplaceAddress.argtypes = [pointer] * 2
        library.cuTensorMapEncodeTiled.argtypes = [pointer, number, number, *[pointer] * 5, *[number] * 4]
    except (OSError, AttributeError):
        return None
    return library


class DriverLaunch:
    """Launches a kernel that Triton has compiled and loaded, on a stream and for other tensors that lie alike.

    Args:
        library: the driver's.
        compiled: Triton's ``CompiledKernel``.
        function: of it, on the device.
        grid: programs along the three axes.
        layout: its parameters.
    """

    def __init__(self, library: Any, compiled: Any, function: int, grid: tuple[int, ...], layout: Layout) -> None:
        metadata = compiled.metadata
        self.name, self.function, self.layout, self.lock = compiled.name, function, layout, threading.Lock()
        self.library, self.launch, self.replace = library, library.cuLaunchKernelEx, library.cuTensorMapReplaceAddress
        self.write = struct.Struct(f"<{len(layout.places)}Q").pack_into
        self.attribute = _Attribute(_SERIALIZED, 0, (1,))
        self.config = _Config(*grid, metadata.num_warps * _WARP, 1, 1, metadata.shared)
        self.config.attributes = ctypes.addressof(self.attribute)
        self.config.num_attributes = int(metadata.launch_pdl)
        self.at_config, self.at_parameters = ctypes.addressof(self.config), ctypes.addressof(layout.parameters)

    def __call__(self, stream: int, tensors: Sequence[Any]) -> None:
        layout = self.layout
        with self.lock:
            self.write(layout.addresses, 0, *[tensors[place].data_ptr() for place in layout.places])
            error = 0
            for at, place in layout.maps:
                error = error or self.replace(at, tensors[place].data_ptr())
            self.config.stream = stream
            error = error or self.launch(self.at_config, self.function, self.at_parameters, None)
            if error == _NO_CONTEXT:
                error = _enter(self.library, tensors[layout.first].get_device())
                error = error or self.launch(self.at_config, self.function, self.at_parameters, None)
        if error:
            raise RuntimeError(f"{self.name}: the CUDA driver refused the launch with error {error}")


def _enter(library: Any, device: int) -> int:
    """Let this thread, which has not used a GPU yet, use the one that PyTorch calls ``device``; an error, or 0."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    error: int = library.cuDeviceGet(ctypes.addressof(handle), device)
    error = error or library.cuDevicePrimaryCtxRetain(ctypes.addressof(context), handle.value)
    return error or library.cuCtxSetCurrent(context.value)


def driver_launch(compiled: Any, function: int, grid: tuple[int, ...], values: Sequence[Any]) -> DriverLaunch | None:
    """The launch of a kernel by the driver; None if only Triton knows how it is done.

    Args:
        compiled, function, grid: see ``DriverLaunch``.
        values: the kernel's arguments, in the place of some tensors their descriptors.
    """
    library, metadata = driver(), compiled.metadata
    scratch = [getattr(metadata, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    if library is None or metadata.launch_cooperative_grid or metadata.num_ctas > 1 or any(scratch):
        return None
    layout = laid_out(library, compiled.src.signature, metadata, values)
    if layout is None or layout.sizes != _sizes_of(library, function):
        return None
    return DriverLaunch(library, compiled, function, grid, layout)


@dataclass(frozen=True)
class Layout:
    """A kernel's parameters in memory.

    Attributes:
        sizes: bytes of each.
        addresses: those of tensors, side by side.
        places: which arguments these tensors are.
        maps: where each tensor map is, and which argument is the tensor that it maps.
        parameters: pointers to all, as the driver takes them.
        kept: memory that they point to.
    """

    sizes: list[int]
    addresses: Any
    places: list[int]
    maps: list[tuple[int, int]]
    parameters: Any
    kept: list[Any]

    @property
    def first(self) -> int:
        """Which argument is the first tensor."""
        return min([*self.places, *(place for _, place in self.maps)])


def laid_out(library: Any, signature: Mapping[str, Any], metadata: Any, values: Sequence[Any]) -> Layout | None:
    """The parameters of a kernel, with Triton's names of their types; None where one of these is not known here."""
    types, metas = [str(kind) for kind in signature.values()], iter(getattr(metadata, "tensordesc_meta", None) or ())
    places = [place for place, kind in enumerate(types) if kind.startswith("*")]
    addresses = (ctypes.c_uint64 * max(len(places), 1))()
    kept, maps, sizes, pointers = list[Any](), list[tuple[int, int]](), list[int](), list[int]()

    def add(value: Any) -> None:
        kept.append(value)
        sizes.append(ctypes.sizeof(value))
        pointers.append(ctypes.addressof(value))

    for place, (kind, value) in enumerate(zip(types, values, strict=True)):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            sizes.append(8)
            pointers.append(ctypes.addressof(addresses) + 8 * places.index(place))
        elif kind in _NUMBERS:
            add(_NUMBERS[kind](value))
        elif kind.startswith("tensordesc") and (meta := next(metas, None)) is not None and _is_plain(value, meta):
            memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
            at = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
            if _encode(library, at, value, meta):
                return None
            kept.append(memory)
            sizes.append(_MAP_BYTES)
            pointers.append(at)
            maps.append((at, place))
            for size in value.shape:
                add(ctypes.c_int32(size))
            for stride in value.strides:
                add(ctypes.c_int64(stride))
        else:
            return None
    for kind in ("global", "profile"):
        if hasattr(metadata, f"{kind}_scratch_size"):
            add(ctypes.c_uint64(0))  # of scratch memory, of which there is none
    return Layout(sizes, addresses, places, maps, (ctypes.c_void_p * len(pointers))(*pointers), kept)


def _is_plain(descriptor: Any, meta: Mapping[str, Any]) -> bool:
    """Whether elements arrive as they are in memory."""
    return not meta["fp4_padded"] and not getattr(descriptor, "round_f32_to_tf32", False)


def _encode(library: Any, at: int, descriptor: Any, meta: Mapping[str, Any]) -> int:
    """Write the tensor map of a descriptor ``at`` an address, as Triton does; the driver's error, or 0."""
    rank, size = len(descriptor.shape), meta["elem_size"]
    shape = (ctypes.c_uint64 * rank)(*reversed(descriptor.shape))
    strides = (ctypes.c_uint64 * rank)(*(size * stride for stride in reversed(descriptor.strides[:-1])))
    block, steps = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"])), (ctypes.c_uint32 * rank)(*[1] * rank)
    kind = _HOST_TYPE.get(meta["elem_type"], meta["elem_type"])
    arrays = [ctypes.addressof(array) for array in (shape, strides, block, steps)]
    fill = int(descriptor.padding == "nan")
    base = descriptor.base.data_ptr()
    error: int = library.cuTensorMapEncodeTiled(
        at, kind, rank, base, *arrays, 0, meta["swizzle"], _PROMOTE_128_BYTES, fill
    )
    return error


def _sizes_of(library: Any, function: int) -> list[int]:
    """Bytes of each parameter of a loaded kernel, as the driver has them."""
    sizes, offset, size = list[int](), ctypes.c_size_t(), ctypes.c_size_t()
    while len(sizes) < _MAX_PARAMETERS and not library.cuFuncGetParamInfo(
        function, len(sizes), ctypes.addressof(offset), ctypes.addressof(size)
    ):
        sizes.append(size.value)
    return sizes
