"""Memory estimate against the formulas of the ZeRO paper and DeepSpeed's estimators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PretrainedConfig

from raycloud.cluster.teacher.memory import MemoryEstimate, ParameterCounts, estimate, library_estimate
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe

LLAMA_7B = LlamaConfig(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
)
STATES = ("weights", "gradients", "optimiser")


def _memory(
    config: PretrainedConfig = LLAMA_7B, **recipe: Any
) -> tuple[MemoryEstimate, ParameterCounts, TuneTeacherRecipe]:
    checked = TuneTeacherRecipe.model_validate({"dtype": "bfloat16", **recipe})
    parameters = ParameterCounts.of(config, checked)
    return estimate(config, parameters, checked, torch.bfloat16), parameters, checked


def test_parameters_are_counted_without_storage() -> None:
    _, parameters, _ = _memory()
    assert parameters.total == parameters.trained == 6_738_415_616
    assert parameters.largest_block == 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    _, with_adapters, _ = _memory(lora={"r": 16})
    assert with_adapters.trained == 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11_008))
    assert with_adapters.total == parameters.total + with_adapters.trained


@pytest.mark.parametrize(
    ("stage", "bytes_each"),
    [(1, 2 + 4 + 12 / 8), (2, 2 + 4 / 8 + 12 / 8), (3, (2 + 4 + 12) / 8)],
)
def test_states_follow_the_papers_formula(stage: int, bytes_each: float) -> None:
    found, parameters, _ = _memory(deepspeed={"stage": stage}, workers={"count": 8}, training={"batch_size": 8})
    assert sum(found.device[what] for what in STATES) == pytest.approx(bytes_each * parameters.total, rel=1e-6)
    assert not found.host


def test_offloading_moves_states_to_the_host() -> None:
    everything = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
    found, parameters, _ = _memory(deepspeed=everything, workers={"count": 2}, training={"batch_size": 2})
    assert all(found.device[what] == 0 for what in STATES)
    assert sum(found.host.values()) == pytest.approx(18 * parameters.total / 2, rel=1e-6)
    *_, (_, device, host) = found.rows
    assert device == sum(found.device.values())
    assert host == sum(found.host.values())


def test_checkpointing_and_shorter_texts_save_activations() -> None:
    plain, frugal = (
        _memory(training={"gradient_checkpointing": frugal})[0].device["activations"] for frugal in (False, True)
    )
    assert frugal < plain / 8
    short = _memory(data={"source": "builtin:instruct", "max_length": 128})[0].device["activations"]
    assert short == plain // 4


def test_deepspeeds_own_estimate_is_near() -> None:
    pytest.importorskip("deepspeed")
    for stage in (2, 3):
        found, parameters, recipe = _memory(
            deepspeed={"stage": stage}, workers={"count": 8}, training={"batch_size": 8}
        )
        theirs = library_estimate(parameters, recipe)
        assert theirs is not None
        ours = sum(found.device[what] for what in (*STATES, "gathered weights"))
        # They count 2 bytes more of gradients a parameter, and one gathered block where we count two.
        assert ours == pytest.approx(theirs[0], rel=0.15)
    _, parameters, recipe = _memory(lora={"r": 16})
    assert library_estimate(parameters, recipe) is None
