"""Which GPU this is, as far as bits and speed depend on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

OLDEST = (8, 0)
"""The oldest compute capability whose tensor cores the kernels were written for."""


@dataclass(frozen=True)
class DeviceKey:
    """A GPU model with the software that compiles for it: what an admission verdict holds for.

    Attributes:
        name: the GPU's own name.
        capability: compute capability, (major, minor).
        num_sms: streaming multiprocessors.
        shared_memory: bytes of shared memory that one program may use.
        versions: torch, CUDA and Triton.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    shared_memory: int
    versions: str


@functools.cache
def device_key(index: int) -> DeviceKey:
    """The key of CUDA device ``index``."""
    import triton  # late: a machine without a GPU need not have it

    properties = torch.cuda.get_device_properties(index)
    return DeviceKey(
        name=properties.name,
        capability=(properties.major, properties.minor),
        num_sms=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        versions=f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}",
    )


def unsupported(device: torch.device) -> str:
    """Why no kernel of ours runs on ``device``, with what to do; empty where they do."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"there are no lowerings for {device.type} devices; move the tensors to the CPU or to an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "this PyTorch sees no GPU here; install a driver and a torch built for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"{name} is sm_{capability[0]}{capability[1]}; the kernels need sm_80 (Ampere) or newer"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "the GPU kernels are written in Triton, which is not installed; pip install 'bicompile[gpu]'"
    return ""
