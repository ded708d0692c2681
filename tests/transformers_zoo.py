"""Tiny random transformers models that the tests share, and the ways to run a batch of rows through one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

transformers.logging.set_verbosity_error()

VOCABULARY = 96
WINDOW = 16  # keys that a query of a sliding layer sees
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 200, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
GROUPED = {**SIZES, **SPECIAL, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
HYBRID = {
    **GROUPED,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
}


@dataclass(frozen=True)
class Causal:
    """A causal language model: its class and its configuration."""

    name: str
    kind: str
    config: Callable[[], Any]

    def build(self, dtype: torch.dtype = torch.float32, attention: str = "batch_invariant", seed: int = 0) -> Any:
        """The model in eval mode, with weights spread wide enough that it does not say one token for ever."""
        config = self.config()
        config.initializer_range = 0.2
        config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, self.kind)(config)
            for parameter in model.parameters():
                if not parameter.isfinite().all() or parameter.abs().max() > 1e3:  # left uninitialised: gpt-oss
                    torch.nn.init.normal_(parameter, std=0.2)
            for name, parameter in model.named_parameters():
                if "expert" in name or "sinks" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
        model.generation_config.eos_token_id = None
        return model.to(dtype).eval().requires_grad_(False)


def _gpt2() -> Any:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_inner=200, n_layer=1, n_head=4, n_positions=1024, **SPECIAL
    )


def _opt() -> Any:
    sizes = {**SIZES, "ffn_dim": 200, "num_hidden_layers": 1, "word_embed_proj_dim": 64}
    return transformers.OPTConfig(max_position_embeddings=1024, **sizes, **SPECIAL)


def _gpt_oss() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers.GptOssConfig(**HYBRID, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope)


def _gemma(kind: str) -> Callable[[], Any]:
    # Tied to its large embeddings, a random head would say the last token again, for ever.
    return lambda: getattr(transformers, kind)(**HYBRID, query_pre_attn_scalar=16, tie_word_embeddings=False)


CAUSAL = {
    model.name: model
    for model in (
        Causal("llama", "LlamaForCausalLM", lambda: transformers.LlamaConfig(**GROUPED, num_hidden_layers=1)),
        Causal("qwen3", "Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**GROUPED, num_hidden_layers=1)),
        Causal(
            "mistral",
            "MistralForCausalLM",
            lambda: transformers.MistralConfig(**GROUPED, num_hidden_layers=1, sliding_window=WINDOW),
        ),
        Causal("gemma2", "Gemma2ForCausalLM", _gemma("Gemma2Config")),
        Causal("gemma3", "Gemma3ForCausalLM", _gemma("Gemma3TextConfig")),
        Causal("gpt-oss", "GptOssForCausalLM", _gpt_oss),
        Causal("gpt2", "GPT2LMHeadModel", _gpt2),
        Causal("opt", "OPTForCausalLM", _opt),
    )
}


def t5(dtype: torch.dtype = torch.float32) -> Any:
    """A T5 of one layer a side, in eval mode."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_ff=200,
        d_kv=16,
        num_heads=4,
        num_layers=1,
        decoder_start_token_id=0,
        attn_implementation="batch_invariant",
        **{**SPECIAL, "eos_token_id": 2},
    )
    return transformers.T5ForConditionalGeneration(config).to(dtype).eval()


def bert(dtype: torch.dtype = torch.float32) -> Any:
    """A BERT of one layer, in eval mode."""
    config = transformers.BertConfig(
        **SIZES, num_hidden_layers=1, max_position_embeddings=1024, attn_implementation="batch_invariant"
    )
    return transformers.BertModel(config).to(dtype).eval()


def whisper(length: int, dtype: torch.dtype = torch.float32) -> Any:
    """A Whisper of one layer a side that hears ``length`` frames of 64 numbers, in eval mode."""
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        decoder_layers=1,
        encoder_layers=1,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        decoder_ffn_dim=200,
        encoder_ffn_dim=200,
        max_source_positions=length,
        decoder_start_token_id=1,
        attn_implementation="batch_invariant",
        **{**SPECIAL, "eos_token_id": 2},
    )
    return transformers.WhisperForConditionalGeneration(config).to(dtype).eval()


def tokens(num_rows: int, length: int, seed: int = 1) -> Tensor:
    """``[num_rows, length]`` of ordinary tokens."""
    return torch.randint(3, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, padding: int, side: str = "left") -> dict[str, Tensor]:
    """What a tokenizer would return for ``ids`` with ``padding`` more tokens on one side; positions without it."""
    empty, full = ids.new_zeros(len(ids), padding), torch.ones_like(ids)
    parts = [(empty, empty), (ids, full)] if side == "left" else [(ids, full), (empty, empty)]
    mask = torch.cat([of_mask for _, of_mask in parts], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": torch.cat([of_ids for of_ids, _ in parts], dim=1),
        "attention_mask": mask,
        "position_ids": positions,
    }


def ragged(ids: Tensor, paddings: Sequence[int], side: str = "left") -> dict[str, Tensor]:
    """A batch of one width: row ``i`` is ``paddings[i]`` of padding and the first tokens of ``ids`` ``[1, n]``."""
    rows = [padded(ids[:, : ids.shape[1] - padding], padding, side) for padding in paddings]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def unpadded(rows: Tensor, paddings: Sequence[int], side: str = "left") -> list[Tensor]:
    """What a model says to the tokens of each row of a ``ragged`` batch."""
    return [
        row[padding:] if side == "left" else row[: len(row) - padding]
        for row, padding in zip(rows, paddings, strict=True)
    ]


def in_chunks(model: Any, batch: dict[str, Tensor], cache: Any, sizes: Iterator[int]) -> Tensor:
    """The logits of ``batch``, fed to ``model`` in chunks of ``sizes`` tokens until it is used up."""
    total = batch["input_ids"].shape[1]
    logits, start = [], 0
    while start < total:
        stop = min(total, start + next(sizes))
        part = {name: batch[name][:, start:stop] for name in ("input_ids", "position_ids")}
        mask = batch["attention_mask"][:, :stop]
        logits.append(model(**part, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        start = stop
    return torch.cat(logits, dim=1)


def decoded(model: Any, said: dict[str, Tensor], encoded: dict[str, Any], cache: Any, sizes: Iterator[int]) -> Tensor:
    """The logits of a decoder that looks at an encoder, of the batch ``said`` fed in chunks of ``sizes`` tokens."""
    total = said["decoder_input_ids"].shape[1]
    logits, start = [], 0
    while start < total:
        stop = min(total, start + next(sizes))
        part = {name: t[:, :stop] if name.endswith("mask") else t[:, start:stop] for name, t in said.items()}
        logits.append(model(**encoded, **part, past_key_values=cache, use_cache=True).logits)
        start = stop
    return torch.cat(logits, dim=1)


def encoder_caches(config: Any, length: int, heard: int) -> dict[str, Any]:
    """A growing and a static cache for a decoder of up to ``length`` tokens that looks at ``heard`` of an encoder."""
    text = config.get_text_config(decoder=True)
    static = [transformers.StaticCache(config=text, max_cache_len=size) for size in (length, heard)]
    return {
        "dynamic": transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache()),
        "static": transformers.EncoderDecoderCache(*static),
    }
