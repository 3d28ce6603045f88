"""Predicted costs are those that torch's counter and the saved tensors of a real training give."""

from __future__ import annotations

import copy

import pytest

from raycloud.retrain.cost import BlockChoice, training_cost
from raycloud.retrain.measure import model_cost
from raycloud.retrain.parts import parts_of
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.tasks import cross_entropy
from raycloud.retrain.trainer import BlockTrainer
from tests.retrain.models import TASK_MODELS, task_model, task_samples

BATCH = 4
LOOSE = ("swinv2", "t5-decoder", "swin")
"""Models whose costs are upper bounds: what runs between their blocks, or position biases that are learnt."""


@pytest.mark.parametrize("name", TASK_MODELS)
def test_predicted_operations_and_memory_are_those_of_the_training(name: str) -> None:
    model = task_model(name)
    samples = task_samples(model)
    cost = model_cost(model, parts_of(model, samples.inputs), samples.select(slice(0, 2)), cross_entropy)
    total = len(cost.blocks)
    for blocks in ([], [0], [total - 1], [1, total - 1], list(range(total))):
        one = copy.deepcopy(model)
        settings = RetrainTraining(batch_size=BATCH, warmup_steps=0)
        parts = parts_of(one, samples.inputs)
        groups, start = parts.groups(blocks), parts.lowest(blocks)
        done = BlockTrainer(one, groups, samples, cross_entropy, settings, start=start, steps=2, seed=0).run()
        choices = [BlockChoice(1.0, index in blocks) for index in range(total)]
        predicted = training_cost(cost, choices, steps=2, batch=BATCH, samples=len(samples))
        assert done.flops <= predicted.flops and done.memory <= predicted.memory
        least = 0.94 if name in LOOSE or not blocks else 0.98
        assert done.flops >= least * predicted.flops, (blocks, done.flops / predicted.flops)
        assert done.memory >= 0.85 * predicted.memory, (blocks, done.memory / predicted.memory)


def test_operations_of_a_block_follow_from_its_sizes() -> None:
    """Hand count for Llama: 2 · weights for a token, and 4 · tokens · width of the heads for the attention."""
    model = task_model("llama")
    samples = task_samples(model)
    (block, *_), tokens = model_cost(model, parts_of(model, samples.inputs), samples, cross_entropy).blocks, 13
    weights = 32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48
    assert block[0].forward == tokens * 2 * weights + 4 * tokens * tokens * 32
    assert block[0].weight_gradient == tokens * 2 * weights
    assert block[0].trained_state == 12 * sum(one.numel() for one in model.model.layers[0].parameters())
