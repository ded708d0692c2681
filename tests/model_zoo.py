"""Small models that the tests share: random weights, one or two layers, reduced dims that cross a block of 192."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 64
INNER = 200  # reduced by the second linear of each feed-forward block: a block of 192 and a ragged tail
HEADS = 4
VOCABULARY = 96
TOKENS = 7
PATCH, PIXELS = 9, 27  # a patch of 3 * 9 * 9 pixels is reduced by the first linear of the ViT: 192 and a tail


@dataclass(frozen=True)
class Model:
    """How to make a model that maps rows of ``row_shape``, hidden states or pixels, to one tensor, and its inputs."""

    name: str
    build: Callable[[], nn.Module]
    row_shape: tuple[int, ...] = (TOKENS, HIDDEN)

    def module(self, dtype: torch.dtype, seed: int = 0) -> nn.Module:
        """The model in ``dtype``, in eval mode, with weights that need no gradient (inputs may)."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build().to(dtype).eval().requires_grad_(False)

    def rows(self, num_rows: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
        """``[num_rows, *row_shape]``: what the model takes."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num_rows, *self.row_shape, generator=generator).to(dtype)


class OrdinaryBlock(nn.Module):
    """What a user writes by hand: LayerNorm, packed qkv attention, RMSNorm, gelu MLP, a softplus on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(attended.reshape(batch, tokens, hidden))
        return x + self.down(F.gelu(self.up(self.norm_2(x)))) + F.softplus(x).mean(1, keepdim=True)


class HiddenStates(nn.Module):
    """A transformers model on ``inputs_embeds``: logits if it has them, else the last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        outputs = self.model(inputs_embeds=x, **kwargs)
        return outputs.logits if "logits" in outputs else outputs.last_hidden_state


class LinearPatches(nn.Module):
    """ViT's patch embedding without convolution: unfold, then one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(3 * PATCH * PATCH, HIDDEN)

    def forward(self, pixels: Tensor, **kwargs: Any) -> Tensor:
        patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [batch, 3, down, across, PATCH, PATCH]
        return self.projection(patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))


class PooledImage(nn.Module):
    """A vision model's pooled output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).pooler_output


def _transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=1, norm=nn.LayerNorm(HIDDEN), enable_nested_tensor=False)


def llama(num_layers: int = 1) -> nn.Module:
    """A ``LlamaForCausalLM`` with grouped-query attention and rotary positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=num_layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS // 2,
            max_position_embeddings=512,
            use_cache=False,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_inner=INNER,
            n_layer=1,
            n_head=HEADS,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            max_position_embeddings=64,
        )
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(
        ViTConfig(
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            image_size=PIXELS,
            patch_size=PATCH,
        )
    )
    model.embeddings.patch_embeddings = LinearPatches()
    return PooledImage(model)


MODELS = {
    model.name: model
    for model in (
        Model("ordinary", OrdinaryBlock),
        Model("encoder", _transformer_encoder),
        Model("llama", lambda: HiddenStates(llama())),
        Model("gpt2", lambda: HiddenStates(_gpt2())),
        Model("bert", lambda: HiddenStates(_bert())),
        Model("vit", _vit, row_shape=(3, PIXELS, PIXELS)),
    )
}
