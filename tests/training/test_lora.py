"""Adapters: they change nothing at first, only they are trained, and PEFT reads the saved files."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from raycloud.benchmarks.family_configs import tiny_model
from raycloud.errors import ModelError
from raycloud.models.segments import Segment
from raycloud.models.weights import weights_of
from raycloud.training.lora import (
    LoraRecipe,
    adapter_weights,
    add_adapters,
    add_segment_adapters,
    check_targets,
    experts_left_out,
    load_adapter,
    load_trainable_weights,
    merge_adapters,
    save_adapter,
    trainable_weights,
)
from tests.models.families import tiny

FAMILIES = {"llama": 7, "gpt2": 4, "gemma3": 7, "opt-projected": 6, "qwen2": 7}
"""And how many linear maps a block has."""
RECIPE = LoraRecipe(r=3, alpha=5, dropout=0.2)
IDS = torch.arange(3, 33).view(2, 15)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return Segment(model.eval())(IDS)


def trained(model: PreTrainedModel) -> PreTrainedModel:
    """Model with adapters that are not zero."""
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_weights(model).values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm() / other.norm()) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing_and_are_all_that_learns(family: str) -> None:
    plain = tiny(family)
    before, own = logits(plain), {name: one.clone() for name, one in weights_of(plain).items()}
    model = add_adapters(plain, RECIPE, seed=3)
    assert torch.equal(logits(model), before)
    Segment(model.train())(IDS).square().mean().backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == adapter_weights(model).keys() == trainable_weights(model).keys()
    assert len(learns) == 2 * FAMILIES[family] * 6
    assert {name.replace(".base_layer", "") for name in weights_of(model)} - learns == own.keys()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_first_block_also_when_it_is_computed_twice(checkpointing: bool) -> None:
    model = add_adapters(tiny("llama"), LoraRecipe(dropout=0.0), seed=0).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    Segment(model)(IDS).square().mean().backward()
    first = model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert first.grad is not None and first.grad.norm() > 0


def test_adapters_are_a_function_of_the_seed_and_leave_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (adapter_weights(add_adapters(tiny("llama"), RECIPE, seed)) for seed in (1, 1, 2))
    torch.manual_seed(0)
    tiny("llama")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    torch.random.set_rng_state(state)
    plain, second = tiny("llama"), tiny("llama")
    state = torch.random.get_rng_state()
    add_adapters(plain, RECIPE, 1)
    add_adapters(second, LoraRecipe(target_modules=["query"]), 1)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_peft_s_and_a_merged_model_is_plain(family: str, tmp_path: Path) -> None:
    plain = tiny(family)
    model = trained(add_adapters(copy.deepcopy(plain), RECIPE, seed=0))
    wanted = logits(model)
    assert not close(logits(plain), wanted)
    save_adapter(model, tmp_path, "org/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["task_type"]) == ("org/base", 3, "CAUSAL_LM")
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert close(logits(theirs.get_base_model()), wanted)
    assert close(logits(load_adapter(copy.deepcopy(plain), tmp_path)), wanted)
    whole = merge_adapters(model)
    assert close(logits(whole), wanted)
    assert {name: one.shape for name, one in weights_of(whole).items()} == {
        name: one.shape for name, one in weights_of(plain).items()
    }
    whole.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    assert all(torch.equal(one, weights_of(whole)[name]) for name, one in weights_of(again).items() if one.ndim > 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_in_different_places_have_the_adapters_of_the_whole_model(family: str) -> None:
    model, *copies = (tiny(family) for _ in range(4))
    before = logits(model)
    add_segment_adapters(Segment(model), RECIPE, seed=3)
    assert torch.equal(logits(model), before)
    learns = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert learns.keys() == adapter_weights(model).keys()
    parts = [
        Segment(copies[0], 0, 1, head=False),
        Segment(copies[1], 1, 4, embed=False, head=False),
        Segment(copies[2], 4, embed=False),
    ]
    for part in parts:
        add_segment_adapters(part, RECIPE, seed=3)
    found = {name: tensor for one in copies for name, tensor in adapter_weights(one).items()}
    assert found.keys() == learns.keys()
    assert all(torch.equal(found[name], learns[name]) for name in learns)
    halves = [name for name in learns if "lora_A" in name and ".0." not in name]
    assert any(not torch.equal(learns[name], learns[name.replace(".1.", ".2.")]) for name in halves)


def test_targets_say_which_maps_are_adapted() -> None:
    model = add_adapters(tiny("llama"), LoraRecipe(target_modules=["q_proj", "v_proj"]), seed=0)
    assert {name.split(".")[4] for name in adapter_weights(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ModelError, match="no linear map 'c_attn' in the blocks; allowed: q_proj, k_proj"):
        add_adapters(tiny("llama"), LoraRecipe(target_modules=["c_attn"]), seed=0)


ROLES = ["query", "key", "value", "attention_output", "ffn_gate", "ffn_up", "ffn_down"]


@pytest.mark.parametrize(
    ("family", "roles", "names"),
    [
        ("llama", ["query", "value"], ["q_proj", "v_proj"]),
        ("llama", ["ffn_gate", "ffn_down"], ["gate_proj", "down_proj"]),
        ("gemma3", ["key", "attention_output", "ffn_up"], ["k_proj", "o_proj", "up_proj"]),
        ("opt", ["attention_output", "ffn_up", "ffn_down"], ["out_proj", "fc1", "fc2"]),
        ("llama", ROLES, None),
        ("opt", [role for role in ROLES if role != "ffn_gate"], None),
        ("gpt2", [role for role in ROLES if role != "ffn_gate"], None),
    ],
)
def test_roles_are_the_maps_with_their_names(family: str, roles: list[str], names: list[str] | None) -> None:
    by_role = add_adapters(tiny(family), LoraRecipe(r=3, target_modules=roles), seed=3)
    by_name = add_adapters(tiny(family), LoraRecipe(r=3, target_modules=names), seed=3)
    wanted, found = adapter_weights(by_name), adapter_weights(by_role)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert isinstance(by_role.peft_config["default"].target_modules, set)  # plain names, as in any adapter


@pytest.mark.parametrize(("role", "path"), [("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")])
def test_a_role_is_found_where_names_are_shared(role: str, path: str, tmp_path: Path) -> None:
    """GPT-2 calls the last maps of both halves of a block c_proj."""
    plain = tiny("gpt2")
    model = trained(add_adapters(copy.deepcopy(plain), LoraRecipe(target_modules=[role]), seed=0))
    assert {name.split(".", 3)[3].split(".lora")[0] for name in adapter_weights(model)} == {path}
    wanted = logits(model)
    save_adapter(model, tmp_path)
    assert close(logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).get_base_model()), wanted)
    assert close(logits(load_adapter(copy.deepcopy(plain), tmp_path)), wanted)
    parts = tiny("gpt2")
    add_segment_adapters(Segment(parts), LoraRecipe(target_modules=[role]), seed=0)
    assert adapter_weights(parts).keys() == adapter_weights(model).keys()


@pytest.mark.parametrize(
    ("roles", "paths"),
    [
        (["ffn_down"], {"output.dense"}),
        (["attention_output", "query"], {"attention.output.dense", "attention.self.query"}),
        (["ffn_up", "value"], {"intermediate.dense", "attention.self.value"}),
        (["key"], {"attention.self.key"}),
    ],
)
def test_an_encoder_s_maps_that_share_a_name_are_told_apart(roles: list[str], paths: set[str]) -> None:
    model = tiny("bert")
    add_segment_adapters(Segment(model, 1, 4, embed=False, head=False), LoraRecipe(target_modules=roles), seed=0)
    found = [name.split(".layer.")[1].split(".lora")[0].split(".", 1) for name in adapter_weights(model)]
    assert {number for number, _ in found} == {"1", "2", "3"} and {path for _, path in found} == paths


def test_roles_and_names_may_be_mixed_and_are_checked_without_weights() -> None:
    mixed = LoraRecipe(target_modules=["c_attn", "ffn_down"])
    found = adapter_weights(add_adapters(tiny("gpt2"), mixed, seed=0))
    assert {name.split(".", 3)[3].split(".lora")[0] for name in found} == {"attn.c_attn", "mlp.c_proj"}
    config = tiny("gpt2").config
    assert check_targets(config, mixed) == {"mlp.c_proj"}
    assert check_targets(config, LoraRecipe(target_modules=["c_attn"])) == frozenset()
    said = "no linear map of a 'gpt2' model has the role 'ffn_gate'; allowed roles: query, key, value, "
    with pytest.raises(ModelError, match=said) as raised:
        check_targets(config, LoraRecipe(target_modules=["ffn_gate"]))
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match=r"no linear map 'q_proj' in the blocks; allowed: .*, or a role: query, key"):
        check_targets(config, LoraRecipe(target_modules=["q_proj", "value"]))


def test_experts_in_fused_tensors_are_said_to_be_left_out() -> None:
    config = tiny_model("qwen3_moe").config
    said = (
        "lora: the experts of a 'qwen3_moe' model are not adapted: mlp.experts.gate_up_proj, mlp.experts.down_proj "
        "hold the matrices of all experts of a block in one tensor"
    )
    assert experts_left_out(config, LoraRecipe()) == said
    for names in (["query", "value"], ["q_proj"]):
        assert experts_left_out(config, LoraRecipe(target_modules=names)) is None
    assert experts_left_out(tiny("llama").config, LoraRecipe()) is None
    with pytest.raises(
        ModelError, match=r"has the role 'ffn_up'; allowed roles: query, .* \(lora: the experts"
    ) as raised:
        check_targets(config, LoraRecipe(target_modules=["query", "ffn_up"]))
    assert "\n" not in str(raised.value)
    shared = tiny_model("deepseek_v3").config  # its first block and its shared experts have maps with the roles
    assert check_targets(shared, LoraRecipe(target_modules=["ffn_up"]))
    assert "not adapted" in str(experts_left_out(shared, LoraRecipe(target_modules=["ffn_up"])))


def test_a_block_without_a_named_map_has_no_adapter() -> None:
    """Qwen3.5's blocks have either attention or a recurrent state."""
    model, recipe = tiny_model("qwen3_5_text"), LoraRecipe(target_modules=["q_proj"])
    for start, end, adapted in ((0, 2, set()), (2, 4, {"blocks.1.self_attn.q_proj"})):
        part = Segment(model, start, end, embed=False, head=False)
        add_segment_adapters(part, recipe, seed=0)
        assert {name.partition(".lora_")[0] for name, one in part.named_parameters() if one.requires_grad} == adapted
    with pytest.raises(ModelError, match="no linear map 'c_attn' in the blocks"):
        add_segment_adapters(Segment(model, 0, 2, head=False), LoraRecipe(target_modules=["c_attn"]), seed=0)


def test_what_was_learnt_moves_from_model_to_model() -> None:
    source, target = trained(add_adapters(tiny("llama"), RECIPE, 0)), add_adapters(tiny("llama"), RECIPE, 1)
    load_trainable_weights(target, trainable_weights(source))
    assert torch.equal(logits(target), logits(source))
    with pytest.raises(ModelError, match="weights do not fit the model"):
        load_trainable_weights(target, trainable_weights(tiny("llama")))
    assert trainable_weights(tiny("llama")).keys() == weights_of(tiny("llama")).keys()


def test_an_adapter_that_is_not_there_or_not_whole_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        load_adapter(tiny("llama"), tmp_path)
    save_adapter(add_adapters(tiny("llama"), RECIPE, 0), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load_adapter(tiny("llama"), tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("megatron_core", "evil"),
        ("megatron_config", {"init_method": "evil"}),
        ("auto_mapping", {"base_model_class": "Evil", "parent_library": "evil"}),
        ("auto_mapping", "evil"),
        ("peft_type", "PROMPT_TUNING"),
    ],
)
def test_an_adapter_that_names_code_is_refused_before_it_is_read(
    field: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ran = tmp_path / "adapter", tmp_path / "ran"
    folder.mkdir()
    save_adapter(add_adapters(tiny("llama"), RECIPE, 0), folder)
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"megatron_config": {}, field: value} if field == "megatron_core" else {field: value}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{field} is .*; allowed: ") as caught:
        load_adapter(tiny("llama"), folder)
    assert "\n" not in str(caught.value)
    assert not ran.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_a_damaged_adapter_configuration_is_one_line(content: str, tmp_path: Path) -> None:
    save_adapter(add_adapters(tiny("llama"), RECIPE, 0), tmp_path)
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"has a damaged adapter_config\.json") as caught:
        load_adapter(tiny("llama"), tmp_path)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_names_a_class_of_transformers_is_read(tmp_path: Path) -> None:
    """PEFT writes such names if no task type is given."""
    source = trained(add_adapters(tiny("llama"), RECIPE, 0))
    wanted = logits(source)
    save_adapter(source, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    library = "transformers.models.llama.modeling_llama"
    config["auto_mapping"] = {"base_model_class": "LlamaForCausalLM", "parent_library": library}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    plain = tiny("llama")
    assert close(logits(load_adapter(plain, tmp_path)), wanted)
