"""Hugging Face transformers: attention and continuous batching under the name ``"batch_invariant"``.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="batch_invariant")

``import bicompile`` makes the name known, before or after transformers is imported, and imports neither.
``cover(model)`` sees to the ops of ``generate`` and ``generate_batch`` that are not compiled.
"""

from .covering import cover
from .registration import register

__all__ = ["cover", "register"]
