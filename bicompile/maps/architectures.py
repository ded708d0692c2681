"""The architectures of the model map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .subjects import (
    IMAGE,
    PATCHES,
    TOKENS,
    WINDOW,
    Inputs,
    Subject,
    asked,
    asked_by_type,
    asked_with_places,
    bare,
    captions,
    heard,
    images,
    patches,
    sentences,
    spectrograms,
    speech,
    text,
    translation,
    waves,
)


def _causal(name: str, prefix: str, family: str = "decoder", model: str = "", **overrides: Any) -> Subject:
    return Subject(name, model or f"{prefix}ForCausalLM", f"{prefix}Config", family, text, overrides)


def _encoder(name: str, prefix: str, inputs: Callable[[Any], Inputs] = sentences, **overrides: Any) -> Subject:
    return Subject(name, f"{prefix}Model", f"{prefix}Config", "encoder", inputs, overrides)


def _pair(name: str, prefix: str, model: str = "", **overrides: Any) -> Subject:
    kind = model or f"{prefix}ForConditionalGeneration"
    return Subject(name, kind, f"{prefix}Config", "encoder-decoder", translation, overrides)


def _vision(name: str, prefix: str, model: str = "", **overrides: Any) -> Subject:
    return Subject(name, model or f"{prefix}Model", f"{prefix}Config", "vision", images, overrides)


_SLIDING: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_STAGES: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 64], "depths": [1, 1, 1, 1]}
_SPEECH = {
    "conv_dim": [32, 32],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
# These compute otherwise when they are compiled, unless told not to: then no bits of eager code could be theirs.
_SCANNED: dict[str, Any] = {"use_associative_scan": False}
_HYBRID: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
}

DECODERS = (
    _causal("Llama", "Llama"),
    _causal("Qwen2", "Qwen2"),
    _causal("Qwen3", "Qwen3"),
    _causal("Mistral", "Mistral"),
    _causal("Gemma", "Gemma"),
    _causal("Gemma 2", "Gemma2", **_SLIDING),
    Subject("Gemma 3", "Gemma3ForCausalLM", "Gemma3TextConfig", "decoder", text, _SLIDING),
    _causal("Phi", "Phi"),
    _causal("Phi-3", "Phi3"),
    _causal("OLMo 2", "Olmo2"),
    _causal("GPT-2", "GPT2", model="GPT2LMHeadModel"),
    _causal("GPT-Neo", "GPTNeo", num_layers=2, attention_types=[[["global", "local"], 1]], window_size=WINDOW),
    _causal("GPT-NeoX", "GPTNeoX"),
    _causal("GPT-J", "GPTJ"),
    _causal("OPT", "OPT"),
    _causal("Bloom", "Bloom"),
    _causal("Falcon", "Falcon"),
    _causal("MPT", "Mpt"),
    _causal("StableLM", "StableLm"),
    _causal("StarCoder 2", "Starcoder2"),
    _causal("Cohere", "Cohere"),
    _causal("Granite", "Granite"),
    _causal("SmolLM3", "SmolLM3"),
    _causal("GLM-4", "Glm4"),
    _causal("Nemotron", "Nemotron"),
    _causal("OLMo", "Olmo"),
    _causal("OLMo 3", "Olmo3", **_SLIDING),
    _causal("GLM", "Glm"),
    _causal("GPT-BigCode", "GPTBigCode"),
    _causal("Cohere 2", "Cohere2", **_SLIDING),
    _causal("EXAONE 4", "Exaone4", sliding_window_pattern=2, **_SLIDING),
    _causal("Arcee", "Arcee"),
    _causal("Seed-OSS", "SeedOss"),
    _causal("HunYuan", "HunYuanDenseV1"),
    _causal("ERNIE 4.5", "Ernie4_5"),
    _causal("Helium", "Helium"),
    _causal("Apertus", "Apertus"),
    _causal("Ministral", "Ministral", **_SLIDING),
    _causal("Ministral 3", "Ministral3"),
    Subject(
        "Gemma 3n",
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        "decoder",
        text,
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        },
    ),
    Subject(
        "Gemma 4", "Gemma4ForCausalLM", "Gemma4TextConfig", "decoder", text, {"num_kv_shared_layers": 0, **_SLIDING}
    ),
)
EXPERTS = (
    _causal("Mixtral", "Mixtral", "experts"),
    _causal("Qwen3-MoE", "Qwen3Moe", "experts"),
    _causal("gpt-oss", "GptOss", "experts", rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **_SLIDING),
    _causal("OLMoE", "Olmoe", "experts"),
    _causal("DeepSeek-V3", "DeepseekV3", "experts", head_dim=8, num_key_value_heads=4),
    _causal("GraniteMoE", "GraniteMoe", "experts"),
    _causal("PhiMoE", "Phimoe", "experts"),
    _causal("Qwen2-MoE", "Qwen2Moe", "experts"),
    _causal("DeepSeek-V2", "DeepseekV2", "experts", head_dim=8, num_key_value_heads=4),
    _causal("GLM-4-MoE", "Glm4Moe", "experts"),
    _causal("ERNIE 4.5 MoE", "Ernie4_5_Moe", "experts", moe_num_experts=4, moe_k=2, moe_layer_start_index=0),
    _causal("MiniMax-M2", "MiniMaxM2", "experts"),
    _causal("dots.llm1", "Dots1", "experts"),
    Subject(
        "Llama 4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        "experts",
        text,
        {
            "num_hidden_layers": 2,
            "intermediate_size_mlp": 200,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
)
RECURRENT = (
    _causal("Mamba", "Mamba", "recurrent", **_SCANNED),
    _causal("Mamba 2", "Mamba2", "recurrent", num_heads=8, head_dim=16, n_groups=1, state_size=16, chunk_size=8),
    _causal("FalconMamba", "FalconMamba", "recurrent", **_SCANNED),
    _causal(
        "Jamba",
        "Jamba",
        "recurrent",
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        **_SCANNED,
    ),
    _causal("Bamba", "Bamba", "recurrent", num_hidden_layers=2, attn_layer_indices=[1], **_HYBRID),
    _causal("Falcon-H1", "FalconH1", "recurrent", **_HYBRID),
    _causal(
        "RecurrentGemma", "RecurrentGemma", "recurrent", num_hidden_layers=2, block_types=["recurrent", "attention"]
    ),
    _causal("RWKV", "Rwkv", "recurrent", num_hidden_layers=2),
    _causal(
        "Qwen3-Next", "Qwen3Next", "recurrent", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    ),
    _causal("LFM2", "Lfm2", "recurrent", num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    _causal(
        "LFM2-MoE",
        "Lfm2Moe",
        "recurrent",
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
    ),
    Subject(
        "Qwen3.5",
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        "recurrent",
        text,
        {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    ),
    _causal(
        "Granite 4",
        "GraniteMoeHybrid",
        "recurrent",
        num_hidden_layers=2,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=200,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
    ),
    _causal(
        "Nemotron-H",
        "NemotronH",
        "recurrent",
        layers_block_type=["mamba", "attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=16,
        use_mamba_kernels=False,
    ),
    _causal(
        "Zamba 2",
        "Zamba2",
        "recurrent",
        num_hidden_layers=2,
        layers_block_type=["mamba", "hybrid"],
        num_key_value_heads=4,
        mamba_headdim=16,
        mamba_d_state=16,
        use_mamba_kernels=False,
    ),
)
ENCODERS = (
    _encoder("BERT", "Bert"),
    _encoder("RoBERTa", "Roberta"),
    _encoder("DistilBERT", "DistilBert"),
    _encoder("DeBERTa", "Deberta"),
    _encoder("DeBERTa-v2", "DebertaV2"),
    _encoder("ELECTRA", "Electra"),
    _encoder("ModernBERT", "ModernBert"),
    _encoder("ALBERT", "Albert"),
    _encoder("MPNet", "MPNet"),
    _encoder("FNet", "FNet", bare),
    _encoder("Longformer", "Longformer"),
    _encoder("XLNet", "XLNet"),
    _encoder("Nystromformer", "Nystromformer", num_landmarks=TOKENS, segment_means_seq_len=TOKENS),
    _encoder("RoFormer", "RoFormer"),
    _encoder("XLM-RoBERTa", "XLMRoberta"),
    _encoder("NomicBERT", "NomicBert"),
    _encoder("EuroBERT", "EuroBert"),
    _encoder("ESM", "Esm", position_embedding_type="rotary"),
    Subject("UMT5 (encoder)", "UMT5EncoderModel", "UMT5Config", "encoder", sentences),
)
PAIRS = (
    _pair("T5", "T5"),
    _pair("BART", "Bart"),
    _pair("mBART", "MBart"),
    _pair("Pegasus", "Pegasus"),
    _pair("Marian", "Marian", model="MarianMTModel"),
    _pair("M2M-100", "M2M100"),
    _pair("ProphetNet", "ProphetNet"),
    _pair("T5Gemma", "T5Gemma"),
)
VISION = (
    _vision("ViT", "ViT"),
    _vision("DeiT", "DeiT"),
    _vision("Swin", "Swin", depths=[1, 1], num_heads=[2, 4], embed_dim=32, window_size=4, patch_size=4),
    _vision("Swin V2", "Swinv2", depths=[1, 1], num_heads=[2, 4], embed_dim=32, window_size=4, patch_size=4),
    _vision("ConvNeXt", "ConvNext", patch_size=4, **_STAGES),
    _vision("ConvNeXt V2", "ConvNextV2", patch_size=4, **_STAGES),
    _vision("BEiT", "Beit"),
    _vision("DINOv2", "Dinov2"),
    _vision("DINOv3", "DINOv3ViT"),
    _vision("I-JEPA", "IJepa"),
    _vision("ResNet", "ResNet", embedding_size=16, layer_type="basic", **_STAGES),
    _vision("RegNet", "RegNet", embedding_size=16, groups_width=8, **_STAGES),
    _vision(
        "EfficientNet",
        "EfficientNet",
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        kernel_sizes=[3, 5],
        in_channels=[32, 16],
        out_channels=[16, 24],
        strides=[1, 2],
        num_block_repeats=[1, 1],
        expand_ratios=[1, 4],
    ),
    _vision("MobileNetV2", "MobileNetV2", depth_multiplier=0.15),
    _vision("MobileViT", "MobileViT", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64]),
    _vision(
        "SegFormer",
        "Segformer",
        model="SegformerForSemanticSegmentation",
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 16, 32, 32],
        num_attention_heads=[1, 2, 4, 4],
        decoder_hidden_size=32,
    ),
    _vision("YOLOS", "Yolos", model="YolosForObjectDetection", image_size=[IMAGE, IMAGE]),
    _vision(
        "DETR",
        "Detr",
        model="DetrForObjectDetection",
        num_queries=10,
        backbone_config={
            "kind": "ResNetConfig",
            "embedding_size": 16,
            "layer_type": "basic",
            "out_features": ["stage4"],
            **_STAGES,
        },
    ),
    _vision(
        "Depth Anything",
        "DepthAnything",
        model="DepthAnythingForDepthEstimation",
        neck_hidden_sizes=[16, 24, 32, 64],
        fusion_hidden_size=16,
        head_hidden_size=16,
        reassemble_hidden_size=64,
        backbone_config={
            "kind": "Dinov2Config",
            "num_hidden_layers": 4,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
            "reshape_hidden_states": False,
        },
    ),
)
AUDIO = (
    Subject(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        "audio",
        speech,
        {"max_source_positions": 20, "num_mel_bins": 16},
    ),
    Subject("Wav2Vec2", "Wav2Vec2Model", "Wav2Vec2Config", "audio", waves, _SPEECH),
    Subject("HuBERT", "HubertModel", "HubertConfig", "audio", waves, _SPEECH),
    Subject("WavLM", "WavLMModel", "WavLMConfig", "audio", waves, _SPEECH),
    Subject(
        "AST",
        "ASTModel",
        "ASTConfig",
        "audio",
        spectrograms,
        {"max_length": 32, "num_mel_bins": 32, "frequency_stride": 8, "time_stride": 8},
    ),
    Subject("Moonshine", "MoonshineForConditionalGeneration", "MoonshineConfig", "audio", heard),
)
_EMBEDDINGS = ("image_embeds", "text_embeds")
MULTIMODAL = (
    Subject("CLIP", "CLIPModel", "CLIPConfig", "multimodal", captions, {}, _EMBEDDINGS),
    Subject("MetaCLIP 2", "MetaClip2Model", "MetaClip2Config", "multimodal", captions, {}, _EMBEDDINGS),
    Subject("SigLIP", "SiglipModel", "SiglipConfig", "multimodal", captions, {}, _EMBEDDINGS),
    Subject("SigLIP 2", "Siglip2Model", "Siglip2Config", "multimodal", patches, {}, _EMBEDDINGS),
    Subject("BLIP", "BlipForConditionalGeneration", "BlipConfig", "multimodal", captions, {}),
    Subject("ViLT", "ViltModel", "ViltConfig", "multimodal", captions, {}),
    Subject(
        "LLaVA",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        "multimodal",
        asked,
        {"text_config": {"kind": "LlamaConfig"}, "vision_config": {"kind": "CLIPVisionConfig"}, "image_seq_length": 16},
    ),
    Subject(
        "PaliGemma",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        "multimodal",
        asked_by_type,
        {"text_config": {"kind": "GemmaConfig"}, "vision_config": {"kind": "SiglipVisionConfig"}},
        answer_type=1,
    ),
    Subject(
        "Gemma 3 (pictures)",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        "multimodal",
        asked_with_places,
        {"mm_tokens_per_image": PATCHES, "text_config": _SLIDING, "vision_config": {"vision_use_head": False}},
    ),
)
SUBJECTS = (*DECODERS, *EXPERTS, *RECURRENT, *ENCODERS, *PAIRS, *VISION, *AUDIO, *MULTIMODAL)


def named(name: str) -> Subject:
    """The subject called ``name``.

    Raises:
        ValueError: there is none.
    """
    for subject in SUBJECTS:
        if subject.name == name:
            return subject
    raise ValueError(f"no model {name!r}; expected one of {', '.join(subject.name for subject in SUBJECTS)}")
