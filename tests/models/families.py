"""Small random models whose segments take the fast path: one line each, for tests of exactness."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SMALL = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 97}
_GQA = {**_SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA),
    "llama-tied": ("llama", {**_GQA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GQA, "sliding_window": 16}),
    "qwen2": ("qwen2", {**_GQA, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
    "qwen3": ("qwen3", {**_GQA, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {**_GQA, "head_dim": 16, "sliding_window": 16, "sliding_window_pattern": 3}),
    "gemma3-untied": (
        "gemma3_text",
        {**_GQA, "head_dim": 16, "sliding_window": 16, "tie_word_embeddings": False, "final_logit_softcapping": 5.0},
    ),
    "gpt2": ("gpt2", {**_SMALL, "n_positions": 128}),
    "gpt2-untied": ("gpt2", {**_SMALL, "n_positions": 128, "tie_word_embeddings": False}),
    "opt": ("opt", {**_SMALL, "ffn_dim": 48, "max_position_embeddings": 128}),
    "opt-projected": ("opt", {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bert": ("bert", {**_SMALL, "intermediate_size": 48, "max_position_embeddings": 128}),
}


def tiny(
    name: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Make a random model of the family, with weights that vary enough for every token to matter."""
    model_type, options = FAMILIES[name]
    options = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options, **changes}
    wide = "init_std" if model_type == "opt" else "initializer_range"
    config = CONFIG_MAPPING[model_type](**options, **{wide: 0.15}, attn_implementation=attention)
    auto = AutoModelForMaskedLM if model_type == "bert" else AutoModelForCausalLM
    torch.manual_seed(seed)
    return auto.from_config(config, attn_implementation=attention).to(dtype).eval()


def final(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a decoder, final hidden states of an encoder, by the library: what segments end with."""
    encoder = getattr(model, "bert", None)
    return model(input_ids=ids).logits if encoder is None else encoder(input_ids=ids).last_hidden_state
