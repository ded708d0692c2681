"""A Llama with random weights, and tokens for it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32_000


def model(
    layers: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, width: int = 2048
) -> LlamaForCausalLM:
    """The model, with the same random weights each time; 16 layers of the usual width have 1.2 billion."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def tokens(batch: int, length: int, device: str = "cuda") -> Tensor:
    """Random tokens [batch, length]: the same for a row and a place in every batch and at every length."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCABULARY, (2048,), generator=generator)[:length] for _ in range(batch)]
    return torch.stack(rows).to(device)
