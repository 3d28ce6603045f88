"""Checkpoints whose tensors the library renames, fuses or computes: loaded as the library loads them, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raycloud.benchmarks.family_configs import tiny_model
from raycloud.benchmarks.family_parts import compare_parts
from raycloud.errors import ModelError
from raycloud.models.checkpoint import Checkpoint, empty_model, load_tensors
from raycloud.models.tensor_check import match_tensors
from raycloud.models.twin import has_language_head

Tensors = dict[str, Tensor]
TYPES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_neox", "falcon_h1", "gpt_oss", "zamba2", "roberta")
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", TYPES)
def test_whole_and_parts_are_those_of_from_pretrained_bit_for_bit(name: str) -> None:
    """The parts read their own stored tensors only; ``compare_parts`` has the library load the whole."""
    assert compare_parts(tiny_model(name, "eager" if name == "gpt_oss" else "sdpa")) == []


def test_what_the_library_keeps_in_single_precision_stays_so() -> None:
    model = tiny_model("deepseek_v3").bfloat16()
    assert compare_parts(model) == []
    empty = empty_model(model.config, dtype=torch.bfloat16, attention="sdpa", device=CPU)
    types = {name.rpartition(".")[2]: tensor.dtype for name, tensor in empty.state_dict().items()}
    assert types["e_score_correction_bias"] == torch.float32 and types["gate_up_proj"] == torch.bfloat16


def saved(name: str, folder: Path, change: Callable[[Tensors], Any]) -> tuple[PretrainedConfig, Tensors]:
    model = tiny_model(name)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model.config, model.state_dict()


def empty_of(config: PretrainedConfig) -> Any:
    return empty_model(config, dtype=torch.float64, attention="sdpa", device=CPU)


QWEN = "model.layers.1.mlp.experts.{}.up_proj.weight"
MIXTRAL = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
LAST, NEXT, SECOND = (QWEN.format(index) for index in (3, 4, 1))


def moved(tensors: Tensors) -> None:
    tensors[NEXT] = tensors.pop(SECOND)


def shorter(tensors: Tensors) -> None:
    tensors[LAST] = tensors[LAST][:-1].clone()


def narrower(tensors: Tensors) -> None:
    tensors[LAST] = tensors[LAST].to(torch.float8_e4m3fn)


def fused(tensors: Tensors) -> None:
    """Add the same experts in the form in which the model runs them."""
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.ones(4, 48, 32)


ODD: dict[str, tuple[str, Callable[[Tensors], Any], tuple[str, ...]]] = {
    "an expert is missing": ("qwen3_moe", lambda tensors: tensors.pop(LAST), (f"lacks {LAST}",)),
    "under its stored name": ("mixtral", lambda tensors: tensors.pop(MIXTRAL.format(0)), (MIXTRAL.format(0),)),
    "an expert too many": (
        "qwen3_moe",
        lambda tensors: tensors.update({NEXT: torch.ones(24, 32)}),
        (f"no place for {NEXT}",),
    ),
    "as many, but another": ("qwen3_moe", moved, (f"lacks {SECOND}", f"no place for {NEXT}")),
    "shape": ("qwen3_moe", shorter, (f"{LAST} has shape (23, 32), not (24, 32)",)),
    "type": ("qwen3_moe", narrower, (f"{LAST} is stored as F8_E4M3",)),
    "twice": ("qwen3_moe", fused, ("no place for model.layers.1.mlp.experts.",)),
    "head": ("gpt_neox", lambda tensors: tensors.pop("embed_out.weight"), ("lacks lm_head.weight",)),
    "stranger": ("falcon_h1", lambda tensors: tensors.update(stranger=torch.ones(1)), ("no place for stranger",)),
}


@pytest.mark.parametrize("case", ODD)
def test_stored_tensors_that_do_not_add_up_are_named(case: str, tmp_path: Path) -> None:
    name, change, words = ODD[case]
    config, _ = saved(name, tmp_path, change)
    with pytest.raises(ModelError) as raised:
        match_tensors(empty_of(config), Checkpoint(str(tmp_path)))
    said = str(raised.value)
    assert "\n" not in said and str(tmp_path) in said
    for word in words:
        assert word in said, said


def test_blocks_that_predict_several_tokens_are_not_of_the_model(tmp_path: Path) -> None:
    """DeepSeek-V3 stores such a block as layer 61, and its class in the library ignores it."""
    stranger = "model.layers.61.eh_proj.weight"
    config, _ = saved("deepseek_v3", tmp_path, lambda tensors: tensors.update({stranger: torch.ones(2, 2)}))
    match_tensors(empty_of(config), Checkpoint(str(tmp_path)))


def test_experts_that_are_stored_as_one_tensor_are_read_as_they_are(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    empty = empty_of(model.config)
    sources, checkpoint = match_tensors(empty, Checkpoint(str(tmp_path))), Checkpoint(str(tmp_path))
    load_tensors(empty, sources, checkpoint, CPU)
    assert all(torch.equal(tensor, state[name]) for name, tensor in empty.state_dict().items())


def test_encoders_are_loaded_without_a_head_and_decoders_with_one() -> None:
    names = ("llama", "mamba", "roberta", "modernbert", "t5")
    assert [has_language_head(CONFIG_MAPPING[name]()) for name in names] == [True, True, False, False, False]
    assert has_language_head(CONFIG_MAPPING["roberta"](is_decoder=True))


def test_an_exported_part_of_a_mixture_loads_by_the_same_mapping(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    config, state = saved("mixtral", whole, lambda tensors: None)
    empty, names = empty_of(config), Checkpoint(str(whole)).tensors
    middle = [empty.model.layers[1], empty.model.layers[2]]
    found = match_tensors(empty, Checkpoint(str(whole)), middle)
    stored = {name for source in found.values() for name in source.stored}
    tensors = {name: tensor for name, tensor in load_file(whole / "model.safetensors").items() if name in stored}
    part.mkdir()
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})

    checkpoint = Checkpoint(str(part))
    load_tensors(empty, match_tensors(empty, checkpoint, middle, whole=names), checkpoint, CPU)
    loaded = {name: tensor for name, tensor in empty.state_dict().items() if not tensor.is_meta}
    assert loaded.keys() == {name for name in state if name.startswith(("model.layers.1.", "model.layers.2."))}
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())

    del tensors[MIXTRAL.format(2)]
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    other = empty_of(config)
    with pytest.raises(ModelError, match=f"lacks {MIXTRAL.format(2)}"):
        match_tensors(other, Checkpoint(str(part)), [*other.model.layers[1:3]], whole=names)
