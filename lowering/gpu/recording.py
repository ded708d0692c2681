"""Which kernels a call would launch, with which types and constants: what is compiled ahead of time for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .ahead import Compilation
from .launch import Launch

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


def recorded(name: str, call: Callable[..., Any], *arguments: Any) -> list[Compilation]:
    """The compilations of ``call(*arguments)``, made on tensors of the meta device: no kernel runs.

    Storages are taken to begin at addresses divisible by 16, as they do on a GPU.
    """
    found: list[Compilation] = []

    def record(launch: Launch, device: int, *tensors: Any) -> None:
        found.append(_compilation(f"{name}, launch {len(found)}", launch, launch.arguments(tensors)))

    with mock.patch.object(Launch, "__call__", record):
        call(*arguments)
    return found


def _compilation(name: str, launch: Launch, arguments: tuple[Any, ...]) -> Compilation:
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for parameter, value in zip(kernel.params, arguments, strict=True):
        if parameter.is_constexpr or value is None:
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            loose = parameter.do_not_specialize or value.storage_offset() * value.element_size() % 16
            signature[parameter.name] = f"*{_TYPES[value.dtype]}{'' if loose else ':16'}"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif not isinstance(value, int):
            signature[parameter.name] = _descriptor(value)
        elif value == 1 and not parameter.do_not_specialize:
            constants[parameter.name] = 1
        else:
            divisible = ":16" if value % 16 == 0 and not parameter.do_not_specialize else ""
            signature[parameter.name] = ("i32" if value < 2**31 else "i64") + divisible
    options = dict(launch.options)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    return Compilation(name, kernel, signature, constants, warps, stages, options)


def _descriptor(value: Any) -> str:
    """The type of a descriptor for TMA, Triton's or Gluon's."""
    layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
    return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
