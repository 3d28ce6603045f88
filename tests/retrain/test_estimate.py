"""Estimate before a plan: the head of all samples, and the error of heads that did not see the samples."""

from __future__ import annotations

import copy

import pytest
import torch

from raycloud.errors import DataError
from raycloud.retrain.cost import Budget, training_cost
from raycloud.retrain.estimate import FOLDS, estimate
from raycloud.retrain.gain import MICRO_BATCHES, MOST_SAMPLES, gain_samples
from raycloud.retrain.measure import model_cost
from raycloud.retrain.parts import parts_of
from raycloud.retrain.plans import training_choices
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.tasks import cross_entropy, wrong
from raycloud.retrain.trainer import mean_error
from raycloud.retrain.window import retrain_blocks
from tests.retrain.models import task_model, task_samples

SETTINGS = RetrainTraining(batch_size=4, head_steps=6)


def test_the_error_is_that_of_heads_that_did_not_see_the_samples() -> None:
    """The reference trains a head for each part by the plain functions of a window, on the samples of the others."""
    source = task_model("vit")
    samples = task_samples(source, 23)
    parts = parts_of(source, samples.select(slice(0, 2)).inputs)
    cost = model_cost(source, parts, samples.select(slice(0, 4)), cross_entropy)
    everything = training_cost(cost, training_choices(cost, range(len(cost.blocks))), steps=300, batch=4, samples=23)
    model = copy.deepcopy(source)
    parts = parts_of(model, samples.select(slice(0, 2)).inputs)
    budget = Budget(everything.flops, everything.memory)
    found = estimate(model, parts, samples, cross_entropy, wrong, SETTINGS, cost, budget, seed=7)

    def reference(rows: torch.Tensor):  # type: ignore[no-untyped-def]
        one = copy.deepcopy(source)
        trained = parts_of(one, samples.select(slice(0, 2)).inputs)
        settings = SETTINGS.model_copy(update={"head_steps": 0})
        retrain_blocks(one, trained, (), samples.select(rows), cross_entropy, settings, steps=6, seed=7)
        return one

    number, mistakes = torch.arange(23), 0.0
    for part in range(FOLDS):
        held = samples.select(number[number % FOLDS == part])
        mistakes += mean_error(reference(number[number % FOLDS != part]), held, wrong) * len(held)
    assert found.error == pytest.approx(mistakes / 23)
    assert found.head_steps == 6
    whole = reference(number)
    for (name, one), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert 0 < found.cost.flops <= 0.05 * budget.flops
    assert found.cost.within(budget)


def test_a_head_that_is_too_dear_is_not_trained() -> None:
    source = task_model("vit")
    samples = task_samples(source, 24)
    parts = parts_of(source, samples.select(slice(0, 2)).inputs)
    cost = model_cost(source, parts, samples.select(slice(0, 4)), cross_entropy)
    each = training_cost(cost, training_choices(cost, range(len(cost.blocks))), steps=1, batch=1, samples=24).flops
    model = copy.deepcopy(source)
    found = estimate(model, parts, samples, cross_entropy, wrong, SETTINGS, cost, Budget(20 * each), seed=7)
    assert found.head_steps == 0
    assert gain_samples(cost, Budget(20 * each), 24) == MICRO_BATCHES
    assert found.error == mean_error(source, samples.select(slice(0, MICRO_BATCHES)), wrong)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), source.parameters(), strict=True))
    assert 16 <= gain_samples(cost, Budget(20.5 * 20 * each), 500) <= 24
    assert gain_samples(cost, Budget(), 500) == MOST_SAMPLES
    with pytest.raises(DataError, match="3 samples are given for 5 parts"):
        estimate(model, parts, samples.select(slice(0, 3)), cross_entropy, wrong, SETTINGS, cost, Budget(), seed=7)
