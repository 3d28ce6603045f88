"""Small twin of a model's configuration: the same class, flags and pattern of layers, with few narrow blocks.

Its segments are checked with random weights before any of the real weights is loaded: what decides whether a model can
be cut is the code that its configuration selects, not the size of its matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
)

from raycloud.errors import ModelError

BLOCKS = 6
"""Number of blocks of a twin: room for three pairs of alternating kinds."""
_HEAD = 8
_MOST_PARAMETERS = 3_000_000
_WIDTH = 48
_FIXED: dict[str, int] = {
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_seq_len": 128,
    "sliding_window": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "window_size": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": _HEAD,
    "query_pre_attn_scalar": _HEAD,
    "rotary_dim": 4,
    "embedding_size": 16,
    "intermediate_size": _WIDTH,
    "intermediate_size_mlp": _WIDTH,
    "ffn_dim": _WIDTH,
    "ffn_hidden_size": _WIDTH,
    "hidden_dim": _WIDTH,
    "block_ff_dim": _WIDTH,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_dt_rank": 4,
    "mamba_d_ssm": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
"""Sizes of a twin, whatever those of the model are; only what its configuration has is set."""
_EVEN_IF_UNSET = ("head_dim", "num_key_value_heads", "num_experts_per_tok")
"""Sizes that some types derive from others if they are not set; a twin sets them."""
INDEX_LISTS = ("attn_layer_indices", "hybrid_layer_ids", "mlp_only_layers")
"""Settings that list the indices of blocks of one kind."""
_NOT_PER_BLOCK = ("time_step_limit", "mlp_multipliers", "ssm_multipliers", "eos_token_id", "pad_token_id")
"""Lists whose length may be the number of blocks by chance."""
LOADING_SETTINGS = (
    "architectures",
    "transformers_version",
    "model_type",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "quantization_config",
)
"""Settings of loading, which change nothing in the structure; a twin has none of them."""


def twin_config(config: PretrainedConfig, blocks: int = BLOCKS) -> PretrainedConfig:
    """Configuration of a small twin of a text model.

    Heads stay a whole number of groups, and blocks of every kind stay.

    Args:
        config: configuration of the text model.
        blocks: number of blocks.

    Raises:
        ModelError: the configuration's class refuses the small sizes.
    """
    given = config.to_dict()
    total = _number(config, "num_hidden_layers") or blocks
    heads = _number(config, "num_attention_heads") or 4
    groups = _number(config, "num_key_value_heads") or heads
    small_groups = 1 if groups == 1 else 2
    small_heads = 4 if groups == heads else small_groups * min(max(1, heads // groups), 4)
    width, rotated = small_heads * _HEAD, given.get("qk_rope_head_dim") is not None
    wanted: dict[str, Any] = {
        **_FIXED,
        "head_dim": _FIXED["qk_rope_head_dim"] if rotated else _HEAD,
        "num_hidden_layers": blocks,
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_heads if groups == heads else small_groups,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "attention_hidden_size": width,
        "lru_width": width,
        "mamba_d_head": 2 * width // _FIXED["mamba_n_heads"],
        "mamba_d_ssm": 2 * width,
        "num_heads": (given.get("expand") or 1) * width // _HEAD,
    }
    small = {name: value for name, value in given.items() if name not in LOADING_SETTINGS}
    for name, value in wanted.items():
        for key in _names(config, name):
            if given.get(key) is not None or (key in given and name in _EVEN_IF_UNSET):
                small[key] = value
    kept = _representatives(given, total, blocks)
    for key, value in given.items():
        if key in INDEX_LISTS and value is not None:
            small[key] = [at for at, block in enumerate(kept) if block in value]
        elif is_per_block(key, value, total):
            small[key] = [value[block] for block in kept]
    try:
        return type(config)(**small)
    except Exception as error:
        why = (str(error).splitlines() or [""])[0][:120]
        raise ModelError(f"a '{config.model_type}' model has no small twin: {type(error).__name__}: {why}") from None


def is_per_block(name: str, value: object, total: int) -> bool:
    """Return whether a setting of a model with ``total`` blocks is a list with one value for each of them."""
    return isinstance(value, list) and len(value) == total and name not in _NOT_PER_BLOCK


def _representatives(given: Mapping[str, Any], total: int, blocks: int) -> list[int]:
    """Blocks of a model that its twin has: the first one of every kind and the first others, or a few of them again."""
    if 0 < total < blocks:
        return [at % total for at in range(blocks)]
    lists = [value for key, value in given.items() if is_per_block(key, value, total)]
    marked = [given[key] for key in INDEX_LISTS if given.get(key) is not None]
    kinds = [(*(repr(one[at]) for one in lists), *(at in one for one in marked)) for at in range(total)]
    firsts = {kind: at for at, kind in reversed(list(enumerate(kinds)))}.values()
    others = [at for at in range(total) if at not in firsts]
    return sorted([*sorted(firsts), *others][:blocks])


def twin_model(config: PretrainedConfig, attention: str, *, seed: int = 0) -> PreTrainedModel:
    """Random model of a configuration's twin, in float32 and evaluation mode.

    It has a language-modelling head if its type can have one.

    Args:
        config: configuration of the real text model.
        attention: attention implementation of the library; ``eager`` is taken where the type has no ``sdpa``.
        seed: seed of the weights.

    Raises:
        ModelError: the twin cannot be built, or stays large.
    """
    small, kind, auto = twin_config(config), config.model_type, auto_class(config)
    torch.manual_seed(seed)
    sized = _empty(small, attention)
    if (count := sum(parameter.numel() for parameter in sized.parameters())) > _MOST_PARAMETERS:
        raise ModelError(f"the twin of a '{kind}' model still has {count / 1e6:.1f} million parameters; run it whole")
    model: PreTrainedModel = auto.from_config(small, attn_implementation=sized.config._attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2 and float(parameter.std()) < 0.05:  # too little of it to notice an error
                parameter.normal_(0, 0.15)
    return model.float().eval()


def has_language_head(config: PretrainedConfig) -> bool:
    """Return whether a type is loaded as a causal language model; other types are loaded without a head.

    By the library's own lists: types that have a masked-language head as well are encoders, or encoders with decoders,
    unless their configuration says ``is_decoder``.
    """
    kind = type(config)
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and not masked


def auto_class(config: PretrainedConfig) -> Any:
    """Class of the library that makes models of a configuration: with a language-modelling head if the type has one.

    Raises:
        ModelError: the library has no model of this type.
    """
    if has_language_head(config):
        return AutoModelForCausalLM
    if type(config) in MODEL_MAPPING:
        return AutoModel
    raise ModelError(f"'{config.model_type}' is no type of text model of transformers {transformers.__version__}")


def _empty(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """Model without memory, with the given attention implementation, or ``eager`` where the type has no other.

    Raises:
        ModelError: models of this configuration cannot be built.
    """
    for name in (attention, "eager"):
        try:
            with torch.device("meta"):
                model: PreTrainedModel = auto_class(config).from_config(copy.deepcopy(config), attn_implementation=name)
            return model
        except ValueError as error:
            why = (str(error).splitlines() or [""])[0][:120]
    raise ModelError(f"a '{config.model_type}' model with attention '{attention}' cannot be built: {why}")


def _number(config: PretrainedConfig, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except Exception:  # of some types a size may vary by block
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _names(config: PretrainedConfig, name: str) -> list[str]:
    """Names under which a configuration keeps a size: its common name, and the type's own."""
    own: Mapping[str, str] = getattr(type(config), "attribute_map", {})
    return [name, *(key for alias, key in own.items() if alias == name)]
