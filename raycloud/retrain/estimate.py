"""Estimate before a plan: the head's first steps, and the error that they leave.

The head is trained first, since its misfit would hide what the blocks lack: with new names for old classes the error
is large, and no block is worth training. The error is cross-validated, as a head knows its own samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from raycloud.errors import DataError
from raycloud.retrain.cost import Budget, Cost, ModelCost
from raycloud.retrain.gain import gain_samples
from raycloud.retrain.meter import measured
from raycloud.retrain.parts import RetrainParts
from raycloud.retrain.plans import head_phase
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import LossOf
from raycloud.retrain.trainer import BlockTrainer, RecordedSamples, mean_error

FOLDS = 5
"""Number of parts of the samples in cross-validation."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of a window once its head fits."""

    error: float
    """Error on samples that the head did not see."""
    head_steps: int
    """Steps that trained the head; 0 if they are too dear."""
    cost: Cost
    """Metered cost of all this."""


def estimate(
    model: PreTrainedModel,
    parts: RetrainParts,
    samples: Samples,
    loss: LossOf,
    error: LossOf,
    settings: RetrainTraining,
    cost: ModelCost,
    budget: Budget,
    seed: int,
) -> Estimate:
    """Train the model's head within its share of the budget, and tell the error that is left for its blocks.

    Args:
        model: the edge's model, whose head changes in place.
        parts: its parts.
        samples: samples of the window.
        loss: loss of the training.
        error: error that is to fall.
        settings: settings of the training.
        cost: costs of the parts.
        budget: budget of the window.
        seed: seed of the order of samples.

    Raises:
        DataError: there are fewer samples than parts in cross-validation.
    """
    if len(samples) < FOLDS:
        raise DataError(f"{len(samples)} samples are given for {FOLDS} parts; allowed: one each or more")
    # What the blocks hand on is held for all samples, and once more for those of a part's training.
    held = len(samples) * cost.boundary[-1]
    steps, _ = head_phase(
        cost,
        replace(budget, memory=max(0.0, budget.memory - held)),
        most=settings.head_steps,
        share=settings.head_share,
        batch=settings.batch_size,
        samples=len(samples),
        times=1 + FOLDS,
    )
    if steps:
        left, spent = _train_head(model, parts, samples, loss, error, settings, steps, seed)
    else:
        some = samples.select(slice(0, gain_samples(cost, budget, len(samples))))
        with measured(model) as metered:
            left = mean_error(model, some, error)
        spent = Cost(metered.flops)
    return Estimate(left, steps, spent)


def _train_head(
    model: PreTrainedModel,
    parts: RetrainParts,
    samples: Samples,
    loss: LossOf,
    error: LossOf,
    settings: RetrainTraining,
    steps: int,
    seed: int,
) -> tuple[float, Cost]:
    """Train the head, last on all samples, and return its error on parts that were held out, with the cost."""
    recorded = RecordedSamples.of(model, len(parts.blocks), samples, settings.batch_size)
    before = {name: one.detach().clone() for name, one in parts.head.items()}
    groups = {"head": dict(parts.head), "blocks": {}}
    fold = torch.arange(len(samples)) % FOLDS
    total, count, spent = 0.0, 0, Cost(recorded.flops)
    for held in range(FOLDS + 1):  # the last one holds out nothing
        with torch.no_grad():
            for name, one in parts.head.items():
                one.copy_(before[name])
        known = recorded.select((fold != held).nonzero()[:, 0])
        done = BlockTrainer(model, groups, known, loss, settings, start=len(parts.blocks), steps=steps, seed=seed).run()
        spent = Cost(done.flops, done.memory + recorded.boundary.nbytes).after(spent)
        if held < FOLDS:
            rest = recorded.select((fold == held).nonzero()[:, 0])
            with measured(model) as metered, torch.no_grad():
                logits = rest.prefix.run(rest.boundary, rest.samples.inputs).logits
                found = error(logits, rest.samples.labels)
            total, count = total + float(found.sum), count + found.count
            spent = Cost(metered.flops).after(spent)
    return total / max(count, 1), spent
