"""Small models of texts and images in float64, and where one of their blocks keeps its linear maps, written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "mlp_ratio": 2,
    "image_size": 16,
    "patch_size": 4,
}
_STAGES = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 97, "pad_token_id": 0}


@dataclass(frozen=True)
class Known:
    """What is known of a block from the library's source."""

    kind: str
    options: dict[str, Any]
    block: str
    query: str
    key: str
    value: str
    output: str
    up: str
    down: str
    gate: str | None = None
    heads: int = 4
    groups: int = 4
    head_size: int = 8
    units: int = 48

    def model(self, seed: int = 0) -> PreTrainedModel:
        """Random model, in float64, whose weights are large enough for every one of them to matter."""
        torch.manual_seed(seed)
        attention = "eager" if self.kind == "swinv2" else "sdpa"
        config = CONFIG_MAPPING[self.kind](**self.options)
        model: PreTrainedModel = AutoModel.from_config(config, attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 0.2)
        return model.double().eval()


def _maps(prefix: str, query: str, key: str, value: str, output: str) -> dict[str, str]:
    return {"query": prefix + query, "key": prefix + key, "value": prefix + value, "output": prefix + output}


_LLAMA = {
    **_maps("self_attn.", "q_proj", "k_proj", "v_proj", "o_proj"),
    "block": "layers.1",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_BERT = {
    **_maps("attention.", "self.query", "self.key", "self.value", "output.dense"),
    "block": "encoder.layer.1",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_VIT = {**_maps("attention.", "q_proj", "k_proj", "v_proj", "o_proj"), "up": "mlp.fc1", "down": "mlp.fc2"}
_CLIP = {
    **_maps("self_attn.", "q_proj", "k_proj", "v_proj", "out_proj"),
    "block": "encoder.layers.1",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}

KNOWN: dict[str, Known] = {
    "llama": Known("llama", {**_TEXT, "num_key_value_heads": 2}, **_LLAMA, groups=2),  # type: ignore[arg-type]
    "qwen3": Known("qwen3", _GROUPED, **_LLAMA, groups=2, head_size=16),  # type: ignore[arg-type]
    "gemma3": Known("gemma3_text", {**_GROUPED, "sliding_window": 8}, **_LLAMA, groups=2, head_size=16),  # type: ignore[arg-type]
    "gpt2": Known(
        "gpt2",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": 97},
        "h.1",
        **_maps("attn.", "c_attn", "c_attn", "c_attn", "c_proj"),
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    "opt": Known(
        "opt",
        {**_TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "decoder.layers.1",
        **_maps("self_attn.", "q_proj", "k_proj", "v_proj", "out_proj"),
        up="fc1",
        down="fc2",
    ),
    "bert": Known("bert", _TEXT, **_BERT),
    "roberta": Known("roberta", _TEXT, **_BERT),
    "vit": Known("vit", _IMAGE, block="layers.1", **_VIT),
    "deit": Known("deit", _IMAGE, block="layers.1", **_VIT),
    "dinov2": Known("dinov2", _IMAGE, block="encoder.layer.1", **_VIT, units=64),
    "swin": Known("swin", _STAGES, block="encoder.layers.1.blocks.1", **_VIT, units=128),
    "swinv2": Known(
        "swinv2",
        _STAGES,
        "encoder.layers.1.blocks.1",
        **_maps("attention.", "self.query", "self.key", "self.value", "output.dense"),
        up="intermediate.dense",
        down="output.dense",
        units=128,
    ),
    "clip": Known("clip_vision_model", _IMAGE, **_CLIP),
    "siglip": Known("siglip_vision_model", _IMAGE, **_CLIP),
    "t5-encoder": Known(
        "t5",
        _T5,
        "encoder.block.1",
        **_maps("layer.0.SelfAttention.", "q", "k", "v", "o"),
        up="layer.1.DenseReluDense.wi",
        down="layer.1.DenseReluDense.wo",
    ),
    "t5-decoder": Known(
        "t5",
        _T5,
        "decoder.block.1",
        **_maps("layer.0.SelfAttention.", "q", "k", "v", "o"),
        up="layer.2.DenseReluDense.wi",
        down="layer.2.DenseReluDense.wo",
    ),
}
"""Blocks of the families that the project promises to slice."""


def inputs_of(model: PreTrainedModel, seed: int = 5, batch: int = 3) -> dict[str, Tensor]:
    """Random input of a model."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, 97, (batch, 13), generator=generator)
    return (
        {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {"input_ids": ids}
    )
