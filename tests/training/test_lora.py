"""Adapters: they begin as nothing, they alone are trained, and PEFT reads what is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.segments import Segment
from raycloud.models.weights import weights_of
from raycloud.training.lora import (
    LoraRecipe,
    adapt,
    adapter_of,
    attach,
    learnt_weights,
    load_adapter,
    load_learnt,
    merge,
    save_adapter,
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
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(1)
    for tensor in adapter_of(model).values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm() / other.norm()) <= 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing_and_are_all_that_learns(family: str) -> None:
    plain = tiny(family)
    before, own = logits(plain), {name: one.clone() for name, one in weights_of(plain).items()}
    model = attach(plain, RECIPE, seed=3)
    assert torch.equal(logits(model), before)
    Segment(model.train())(IDS).square().mean().backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == adapter_of(model).keys() == learnt_weights(model).keys()
    assert len(learns) == 2 * FAMILIES[family] * 6
    assert {name.replace(".base_layer", "") for name in weights_of(model)} - learns == own.keys()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_first_block_also_when_it_is_computed_twice(checkpointing: bool) -> None:
    model = attach(tiny("llama"), LoraRecipe(dropout=0.0), seed=0).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    Segment(model)(IDS).square().mean().backward()
    first = model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert first.grad is not None and first.grad.norm() > 0


def test_adapters_are_a_function_of_the_seed_and_leave_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (adapter_of(attach(tiny("llama"), RECIPE, seed)) for seed in (1, 1, 2))
    torch.manual_seed(0)
    tiny("llama")
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    torch.random.set_rng_state(state)
    plain = tiny("llama")
    state = torch.random.get_rng_state()
    attach(plain, RECIPE, 1)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_is_peft_s_and_a_merged_model_is_plain(family: str, tmp_path: Path) -> None:
    plain = tiny(family)
    model = trained(attach(copy.deepcopy(plain), RECIPE, seed=0))
    wanted = logits(model)
    assert not close(logits(plain), wanted)
    save_adapter(model, tmp_path, "org/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["task_type"]) == ("org/base", 3, "CAUSAL_LM")
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert close(logits(theirs.get_base_model()), wanted)
    assert close(logits(load_adapter(copy.deepcopy(plain), tmp_path)), wanted)
    whole = merge(model)
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
    adapt(Segment(model), RECIPE, seed=3)
    assert torch.equal(logits(model), before)
    learns = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert learns.keys() == adapter_of(model).keys()
    parts = [
        Segment(copies[0], 0, 1, head=False),
        Segment(copies[1], 1, 4, embed=False, head=False),
        Segment(copies[2], 4, embed=False),
    ]
    for part in parts:
        adapt(part, RECIPE, seed=3)
    found = {name: tensor for one in copies for name, tensor in adapter_of(one).items()}
    assert found.keys() == learns.keys()
    assert all(torch.equal(found[name], learns[name]) for name in learns)
    halves = [name for name in learns if "lora_A" in name and ".0." not in name]
    assert any(not torch.equal(learns[name], learns[name.replace(".1.", ".2.")]) for name in halves)


def test_targets_say_which_maps_are_adapted() -> None:
    model = attach(tiny("llama"), LoraRecipe(targets=["q_proj", "v_proj"]), seed=0)
    assert {name.split(".")[4] for name in adapter_of(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ModelError, match="no linear map 'c_attn' in the blocks; allowed: q_proj, k_proj"):
        attach(tiny("llama"), LoraRecipe(targets=["c_attn"]), seed=0)


def test_what_was_learnt_moves_from_model_to_model() -> None:
    source, target = trained(attach(tiny("llama"), RECIPE, 0)), attach(tiny("llama"), RECIPE, 1)
    load_learnt(target, learnt_weights(source))
    assert torch.equal(logits(target), logits(source))
    with pytest.raises(ModelError, match="weights do not fit the model"):
        load_learnt(target, learnt_weights(tiny("llama")))
    assert learnt_weights(tiny("llama")).keys() == weights_of(tiny("llama")).keys()


def test_an_adapter_that_is_not_there_or_not_whole_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        load_adapter(tiny("llama"), tmp_path)
    save_adapter(attach(tiny("llama"), RECIPE, 0), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load_adapter(tiny("llama"), tmp_path)
