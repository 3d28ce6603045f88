"""Tiny configurations of the library's text models: four narrow blocks with random weights, by model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Options = Mapping[str, Any]

SIZES: Options = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
    "sliding_window": 8,
}
_EXPERTS: Options = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "decoder_sparse_step": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT: Options = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
_STATE_SPACE: Options = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "state_size": 8,
    "time_step_rank": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
}
_LINEAR: Options = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2


def _rope(kind: str, theta: float, **options: Any) -> Options:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **options}}


_MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "phimoe",
    "olmoe",
    "gpt_oss",
    "glm4_moe",
    "minimax_m2",
    "granitemoe",
)

DECODERS: dict[str, tuple[str, Options]] = {
    **{
        name: (name, {})
        for name in [
            "llama",
            "mistral",
            "ministral",
            "ministral3",
            "qwen2",
            "qwen3",
            "gemma",
            "phi",
            "phi3",
            "olmo",
            "olmo2",
            "olmo3",
            "smollm3",
            "gpt_neox",
            "starcoder2",
            "stablelm",
            "glm",
            "glm4",
            "exaone4",
            "nemotron",
            "ernie4_5",
            "seed_oss",
            "hunyuan_v1_dense",
            "arcee",
            "bitnet",
            "bloom",
        ]
    },
    **{
        name: (name, _EXPERTS)
        for name in [
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "phimoe",
            "olmoe",
            "gpt_oss",
            "glm4_moe",
            "minimax_m2",
            "granitemoe",
        ]
    },
    **{name: (name, {**_EXPERTS, **_LATENT}) for name in ("deepseek_v2", "deepseek_v3")},
    "llama3-rope": (
        "llama",
        _rope(
            "llama3",
            5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama-yarn": ("llama", _rope("yarn", 1e4, factor=4.0, original_max_position_embeddings=32)),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "qwen3_next": ("qwen3_next", {**_EXPERTS, **_LINEAR}),
    "qwen3_5_text": ("qwen3_5_text", _LINEAR),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_EXPERTS, **_LINEAR}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3_text", {"sliding_window_pattern": 2, "query_pre_attn_scalar": 8}),
    "gemma3n_text": (
        "gemma3n_text",
        {
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "laurel_rank": 4,
            "layer_types": _ALTERNATING,
            "activation_sparsity_pattern": None,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        {
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
            "layer_types": _ALTERNATING,
            "global_head_dim": 16,
        },
    ),
    "gemma4-plain": (
        "gemma4_text",
        {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "layer_types": _ALTERNATING},
    ),
    "phi3-longrope": (
        "phi3",
        {
            **_rope(
                "longrope",
                1e4,
                short_factor=[1.0] * 4,
                long_factor=[2.0] * 4,
                factor=4.0,
                original_max_position_embeddings=32,
                partial_rotary_factor=1.0,
            ),
            "original_max_position_embeddings": 32,
        },
    ),
    "granite": ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "falcon": ("falcon", {"alibi": False, "new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "gpt2": ("gpt2", {"n_positions": 128}),
    "gpt_neo": ("gpt_neo", {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8}),
    "gptj": ("gptj", {"rotary_dim": 4, "n_positions": 128}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mpt": ("mpt", {"max_seq_len": 128}),
    "gpt_bigcode": ("gpt_bigcode", {"n_positions": 128}),
    "cohere": ("cohere", {"logit_scale": 0.5}),
    "cohere2": ("cohere2", {"logit_scale": 0.5}),
    "llama4_text": ("llama4_text", {**_EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 8}),
    "mamba": ("mamba", _STATE_SPACE),
    "mamba2": (
        "mamba2",
        {**_STATE_SPACE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "expand": 2},
    ),
    "jamba": (
        "jamba",
        {
            **_EXPERTS,
            **_STATE_SPACE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "falcon_h1": ("falcon_h1", {**_STATE_SPACE, "mamba_d_ssm": 64, "mamba_chunk_size": 8}),
    "bamba": ("bamba", {**_STATE_SPACE, "attn_layer_indices": [1, 3], "mamba_chunk_size": 8}),
    "zamba2": (
        "zamba2",
        {
            **_STATE_SPACE,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_mem_blocks": 1,
            "hybrid_layer_ids": [1, 3],
            "adapter_rank": 4,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48, "block_multiple_of": 8}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    ),
    "rwkv": ("rwkv", {"attention_hidden_size": 32}),
    "t5": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4}),
}
"""Language models: type and options of each configuration."""

ENCODERS: dict[str, tuple[str, Options]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {"pad_token_id": 1, "bos_token_id": 0}),
    "xlm-roberta": ("xlm-roberta", {"pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": ("distilbert", {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48}),
    "modernbert": (
        "modernbert",
        {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "deberta-v2": (
        "deberta-v2",
        {
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    "electra": ("electra", {"embedding_size": 16}),
    "albert": ("albert", {"embedding_size": 16}),
    "mpnet": ("mpnet", {"pad_token_id": 1}),
}
"""Encoders: type and options of each configuration."""

_TWO_CHAINS = ("t5",)
_SINGLE_PRECISION = ("mamba2",)
"""Types whose kernels compute in float32 only."""


def tiny_config(kind: str, options: Options) -> PretrainedConfig:
    """Tiny configuration of a model type: the common sizes that the type knows, and its own options."""
    made = CONFIG_MAPPING[kind]
    probe = made()
    settable = {
        *getattr(probe, "attribute_map", {}),
        *vars(probe),
        "layer_types",
        *(name for name in {**SIZES, **options} if _has(probe, name) and not hasattr(type(probe), name)),
    }
    sizes = {name: value for name, value in SIZES.items() if name in settable}
    if not _has(probe, "num_key_value_heads"):
        sizes.pop("num_key_value_heads", None)
    return made(**{**sizes, **{name: value for name, value in options.items() if name in settable}})


def _has(config: PretrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # of some types an attribute may vary by block, and asking for one value is an error
        return True


def tiny_model(name: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """Random model of a configuration; in float64 with sdpa, where its kernels allow it.

    Raises:
        ValueError: the model has no such attention implementation.
    """
    causal = name in DECODERS
    kind, options = DECODERS[name] if causal else ENCODERS[name]
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if causal and name not in _TWO_CHAINS else AutoModel
    model: PreTrainedModel = auto.from_config(tiny_config(kind, options), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and float(parameter.std()) < 0.05:  # too little of it to notice an error
                parameter.normal_(0, 0.15)
    # Eager masks add up to infinity in float64, and the library's own outputs become NaN.
    if name in _SINGLE_PRECISION or attention == "eager":
        return model.float().eval()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"  # the grouped kernels lack float64
    return model.double().eval()
