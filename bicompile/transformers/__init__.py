"""Hugging Face transformers: attention and continuous batching under the name ``"batch_invariant"``.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="batch_invariant")

``import bicompile`` makes the name known, before or after transformers is imported, and imports neither.
``cover(model)`` sees to the ops of ``generate`` and ``generate_batch`` that are not compiled;
``seed_requests(manager)`` gives the requests of continuous batching seeds.
"""

from typing import Any

from .covering import cover
from .registration import register

__all__ = ["cover", "register", "seed_requests"]


def __getattr__(name: str) -> Any:
    """``seed_requests`` on first use: its module imports transformers."""
    if name != "seed_requests":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .seeding import seed_requests

    return seed_requests
