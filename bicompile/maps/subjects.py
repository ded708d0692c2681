"""What the model map tries: tiny random models of transformers' own classes, and inputs for each family."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

Inputs = dict[str, Tensor]

VOCABULARY = 96
ROWS = 3
TOKENS = 12
IMAGE, PATCH = 32, 8
PATCHES = (IMAGE // PATCH) ** 2
PICTURE, FIRST_WORD, LAST_WORD = 3, 4, 90  # the token that stands for a picture; ordinary tokens
WINDOW = 16

# Under every name that a size goes by: a configuration takes those that it has.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim"], 64),
    **dict.fromkeys(["word_embed_proj_dim", "projection_dim", "lru_width", "attention_hidden_size"], 64),
    # More than a block of 192 is added up.
    **dict.fromkeys(["intermediate_size", "n_inner", "d_inner", "ffn_dim", "d_ff", "hidden_dim"], 200),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"], 200),
    **dict.fromkeys(["shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"], 200),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"], 1),
    **dict.fromkeys(["num_decoder_layers", "depth", "encoder_num_hidden_layers", "decoder_num_hidden_layers"], 1),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "linear_num_value_heads", "encoder_num_attention_heads"], 4),
    "decoder_num_attention_heads": 4,
    **dict.fromkeys(["num_key_value_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "linear_key_head_dim", "global_head_dim"], 16),
    **dict.fromkeys(["linear_value_head_dim", "v_head_dim", "qk_nope_head_dim", "query_pre_attn_scalar"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim", "laurel_rank"], 8),
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 32),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"], 256),
    "first_k_dense_replace": 0,
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    "type_vocab_size": 2,
    "sliding_window": WINDOW,
    "attention_window": WINDOW,
    "local_attention": WINDOW,
    "attention_window_size": WINDOW,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "num_patches": PATCHES,
    "initializer_range": 0.2,  # else every row says nearly the same
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_token_id": PICTURE,
    "image_token_index": PICTURE,
    "video_token_id": 94,
    "vision_start_token_id": 93,
    "vision_end_token_id": 92,
    "use_cache": True,
}


def configuration(cls: Any, overrides: dict[str, Any]) -> Any:
    """A configuration of class ``cls`` with our sizes, those of its parts too; ``overrides`` go first."""
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    settings = {name: value for name, value in _SIZES.items() if name in names}
    for name, part in cls.sub_configs.items():
        given = dict(overrides.get(name, {}))
        kind = given.pop("kind", "")
        settings[name] = configuration(getattr(transformers, kind) if kind else part, given)
    settings.update({name: value for name, value in overrides.items() if name not in cls.sub_configs})
    return cls(**settings)


@dataclass(frozen=True)
class Subject:
    """One model of the map.

    Attributes:
        name: as people call it.
        model: its class in transformers.
        config: its configuration's class.
        family: under which heading it is listed.
        inputs: makes a batch of ``ROWS`` rows for the configuration.
        overrides: of ``_SIZES``, for this configuration.
        outputs: which of the model's outputs are looked at; all tensors if none is named.
        answer_type: the token type of what follows the inputs, where tokens have types.
    """

    name: str
    model: str
    config: str
    family: str
    inputs: Callable[[Any], Inputs]
    overrides: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    answer_type: int = 0

    def build(self, attention: str | None) -> Any:
        """The model in eval mode, with finite random weights that need no gradient."""
        config = configuration(getattr(transformers, self.config), self.overrides)
        if attention is not None:
            config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config)
            for name, parameter in model.named_parameters():
                left_empty = not parameter.isfinite().all() or (parameter.abs() > 1e3).any()
                if left_empty or "expert" in name or "sinks" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
        return model.eval().requires_grad_(False)


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has an argument called ``name``."""
    return name in inspect.signature(type(model).forward).parameters


def words(rows: int, length: int, seed: int = 1) -> Tensor:
    """``[rows, length]`` of ordinary tokens."""
    return torch.randint(FIRST_WORD, LAST_WORD, (rows, length), generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mask(side: str) -> Tensor:
    """Rows of different lengths: the first is whole, the others are padded on ``side``."""
    padding = torch.arange(ROWS)[:, None] * 2
    places = torch.arange(TOKENS)
    return (places >= padding if side == "left" else places < TOKENS - padding).long()


def text(config: Any) -> Inputs:
    """Sentences padded on the left, for a decoder."""
    return {"input_ids": words(ROWS, TOKENS), "attention_mask": _mask("left")}


def sentences(config: Any) -> Inputs:
    """Sentences padded on the right, for an encoder."""
    return {"input_ids": words(ROWS, TOKENS), "attention_mask": _mask("right")}


def bare(config: Any) -> Inputs:
    """Sentences of one length, for a model without a mask."""
    return {"input_ids": words(ROWS, TOKENS)}


def translation(config: Any) -> Inputs:
    """Sentences and what is said to them."""
    return {**sentences(config), "decoder_input_ids": words(ROWS, TOKENS, seed=2)}


def images(config: Any) -> Inputs:
    """Pictures."""
    return {"pixel_values": torch.randn(ROWS, 3, IMAGE, IMAGE, generator=_generator(3))}


def waves(config: Any) -> Inputs:
    """Sound as it is sampled."""
    return {"input_values": torch.randn(ROWS, 1000, generator=_generator(4))}


def spectrograms(config: Any) -> Inputs:
    """Sound by frequencies, for a transformer over patches of it."""
    return {"input_values": torch.randn(ROWS, config.max_length, config.num_mel_bins, generator=_generator(4))}


def speech(config: Any) -> Inputs:
    """Sound by frequencies, and what is written down."""
    frames = 2 * config.max_source_positions
    return {
        "input_features": torch.randn(ROWS, config.num_mel_bins, frames, generator=_generator(4)),
        "decoder_input_ids": words(ROWS, TOKENS, seed=2),
    }


def captions(config: Any) -> Inputs:
    """Pictures and sentences, side by side."""
    return {**sentences(config), **images(config)}


def patches(config: Any) -> Inputs:
    """Sentences and pictures cut into patches, for a model of pictures of any shape."""
    return {
        **sentences(config),
        "pixel_values": torch.randn(ROWS, PATCHES, 3 * PATCH * PATCH, generator=_generator(3)),
        "pixel_attention_mask": torch.ones(ROWS, PATCHES, dtype=torch.long),
        "spatial_shapes": torch.full((ROWS, 2), IMAGE // PATCH),
    }


def asked(config: Any) -> Inputs:
    """Sentences that begin with a picture of 16 patches."""
    ids = words(ROWS, PATCHES + TOKENS)
    ids[:, :PATCHES] = PICTURE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images(config)}


def asked_by_type(config: Any) -> Inputs:
    """The same for a model that is told which tokens are the question, which all see each other: type 0, so far all."""
    inputs = asked(config)
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def asked_with_places(config: Any) -> Inputs:
    """The same for a model that is told where the picture is, whose patches see each other: type 1."""
    inputs = asked(config)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == PICTURE).long()}


def heard(config: Any) -> Inputs:
    """Sound as it is sampled, and what is written down."""
    return {
        "input_values": torch.randn(ROWS, 4000, generator=_generator(4)),
        "decoder_input_ids": words(ROWS, TOKENS, seed=2),
    }
