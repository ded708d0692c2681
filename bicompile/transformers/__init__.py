"""Hugging Face transformers: attention and continuous batching under the name ``"batch_invariant"``.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="batch_invariant")

``import bicompile`` makes the name known, before or after transformers is imported, and imports neither.
``cover(model)`` sees to the ops of ``generate`` and ``generate_batch`` that are not compiled;
``seed_requests(manager)`` gives the requests of continuous batching seeds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register

if TYPE_CHECKING:
    from .covering import cover
    from .seeding import seed_requests

__all__ = ["cover", "register", "seed_requests"]


_HOMES = {"cover": "covering", "seed_requests": "seeding"}


def __getattr__(name: str) -> Any:
    """On first use: their modules import torch and transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
