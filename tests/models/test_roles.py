"""Roles of linear maps, against the names that the library gives them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig

from raycloud.benchmarks.family_configs import tiny_model
from raycloud.errors import ModelError
from raycloud.models.chain import block_list_of
from raycloud.models.roles import ROLES, AttentionRoles, BlockRoles, FeedForwardRoles, roles_of
from tests.models.blocks import KNOWN, Known


def roles_at(model: nn.Module, path: str) -> BlockRoles:
    return roles_of(model, {path: model.get_submodule(path)})[path]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KNOWN)
def test_roles_are_what_the_library_names_them(name: str) -> None:
    known = KNOWN[name]
    found = roles_at(known.model(), known.block)
    assert found.attentions[0] == AttentionRoles((known.query,), (known.key,), (known.value,), known.output)
    gate = () if known.gate is None else (known.gate,)
    assert found.feed_forwards == (FeedForwardRoles((known.up,), gate, known.down, known.units),)
    assert len(found.attentions) == (2 if name == "t5-decoder" else 1)
    bias = ("attention.self.continuous_position_bias_mlp.0", "attention.self.continuous_position_bias_mlp.2")
    assert found.other == (bias if name == "swinv2" else ()) and found.fused_experts == ()


def test_a_decoder_with_an_encoder_has_two_attentions() -> None:
    _, cross = roles_at(KNOWN["t5-decoder"].model(), "decoder.block.1").attentions
    q, k, v, o = (f"layer.1.EncDecAttention.{name}" for name in "qkvo")
    assert cross == AttentionRoles((q,), (k,), (v,), o)


@pytest.mark.parametrize(
    ("name", "index", "expected"),
    [
        ("phi3", 0, {"query": "self_attn.qkv_proj", "ffn_gate": "mlp.gate_up_proj", "ffn_up": "mlp.gate_up_proj"}),
        ("gpt_neox", 0, {"value": "attention.query_key_value", "ffn_up": "mlp.dense_h_to_4h", "ffn_gate": None}),
        ("modernbert", 0, {"key": "attn.Wqkv", "ffn_gate": "mlp.Wi", "ffn_down": "mlp.Wo"}),
        ("deepseek_v3", 0, {"query": "self_attn.q_b_proj", "value": "self_attn.kv_b_proj"}),
        ("lfm2", 0, {"query": None, "ffn_gate": "feed_forward.w1", "ffn_up": "feed_forward.w3"}),
        ("mamba", 0, dict.fromkeys(ROLES)),
        # RMSNorm between the units and the last map mixes them, so which maps are gate and up is not seen.
        ("bitnet", 0, {"attention_output": "self_attn.o_proj", "ffn_up": None, "ffn_down": None}),
    ],
)
def test_fused_and_missing_maps(name: str, index: int, expected: dict[str, str | None]) -> None:
    model = tiny_model(name, "eager" if name == "mamba" else "sdpa")
    path = list(block_list_of(model).blocks)[index]
    found = roles_at(model, path)
    for role, wanted in expected.items():
        assert found.paths(role) == (() if wanted is None else (wanted,))  # type: ignore[arg-type]


def test_of_a_mixture_the_dense_maps_are_named_and_the_experts_too() -> None:
    found = roles_at(tiny_model("qwen2_moe"), "model.layers.1")
    assert found.feed_forwards[0].down == "mlp.shared_expert.down_proj"
    assert found.other == ("mlp.shared_expert_gate",)
    assert found.fused_experts == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def test_a_block_that_uses_keys_of_an_earlier_one_has_queries_only() -> None:
    (attention,) = roles_at(tiny_model("gemma4_text"), "model.layers.2").attentions
    assert attention == AttentionRoles(("self_attn.q_proj",), (), (), "self_attn.o_proj")


def test_the_model_is_left_as_it_was() -> None:
    known: Known = KNOWN["llama"]
    model = known.model().train()
    model.layers[1].requires_grad_(False)
    model.layers[2].eval()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    roles_at(model, known.block)
    assert model.training and model.layers[1].training and not model.layers[2].mlp.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(one.requires_grad for one in model.layers[1].parameters())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert not model.layers[1]._forward_pre_hooks


def test_a_model_without_weights_is_refused_in_one_line() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(ModelError, match="a 'llama' model without its weights cannot be traced"):
        roles_at(model, "layers.0")
