"""Hugging Face transformers: attention and continuous batching under the name ``"batch_invariant"``.

    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="batch_invariant")

``import bicompile`` makes the name known, before or after transformers is imported, and imports neither.
"""

from .registration import register

__all__ = ["register"]
