"""Scenarios of the benchmark of block retraining: a source model, and windows of samples of other domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from raycloud.retrain.cost import Budget, ModelCost, training_cost
from raycloud.retrain.measure import model_cost
from raycloud.retrain.parts import parts_of
from raycloud.retrain.plans import training_choices
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import RetrainTask


@dataclass(frozen=True)
class Regime:
    """Size of a window and its budget."""

    samples: int
    full_steps: int
    """Number of steps of full fine-tuning whose operations are the budget."""
    most_steps: int
    """Largest number of steps; training the head costs next to nothing."""


@dataclass(frozen=True)
class DomainWindow:
    """Samples of one domain for one source model."""

    window: Samples
    test: Samples


class RetrainScenario(Protocol):
    """Source model of one seed, and its domains."""

    seed: int
    name: str
    task: RetrainTask
    settings: RetrainTraining
    regimes: Mapping[str, Regime]
    domains: Sequence[str]
    """Domains that methods are compared on."""
    simulated: Mapping[str, Sequence[str]]
    """Domains by kind that the cloud makes of source samples, to learn what retraining gives; none of the former."""

    def model(self) -> PreTrainedModel:
        """Source model, a new copy."""
        ...

    def window(self, domain: str, samples: int) -> DomainWindow:
        """Window and test of a domain."""
        ...

    def figure(self, error: float) -> float:
        """Figure for an error of the task."""
        ...


def cost_and_budget(scenario: RetrainScenario, regime: Regime, window: Samples) -> tuple[ModelCost, Budget]:
    """Costs of a scenario's model, and what full fine-tuning takes in a regime, which is every method's budget."""
    model, some = scenario.model(), window.select(slice(0, 4))
    cost = model_cost(model, parts_of(model, some.inputs), some, scenario.task.loss)
    everything, batch = training_choices(cost, range(len(cost.blocks))), scenario.settings.batch_size
    full = training_cost(cost, everything, steps=regime.full_steps, batch=batch, samples=len(window))
    return cost, Budget(full.flops, full.memory, full.bytes)
