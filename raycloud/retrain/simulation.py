"""Simulated drifts: what training sets of blocks within a budget leaves in domains that the cloud has."""

from __future__ import annotations

from transformers import PreTrainedModel

from raycloud.models.chain import block_list_of
from raycloud.retrain.cost import Budget, ModelCost
from raycloud.retrain.estimate import estimate
from raycloud.retrain.gain import block_gains, gain_samples
from raycloud.retrain.law_prior import SimulatedDrift
from raycloud.retrain.parts import parts_of
from raycloud.retrain.pilots import Pilot
from raycloud.retrain.plans import Terms, affordable_steps, training_choices
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import LossOf
from raycloud.retrain.trainer import mean_error
from raycloud.retrain.window import retrain_blocks


def sets_of_blocks(blocks: int) -> list[tuple[int, ...]]:
    """Sets that pilots train: none, first, middle and last, first with last, runs from either end, and all."""
    every = tuple(range(blocks))
    half, last = blocks // 2, blocks - 1
    sets = [(), (0,), (half,), (last,), (0, last), every[:2], every[-2:], every[:half], every[half:], every]
    return list(dict.fromkeys(sets))


def simulated_drift(
    kind: str,
    model: PreTrainedModel,
    window: Samples,
    test: Samples,
    loss: LossOf,
    error: LossOf,
    settings: RetrainTraining,
    cost: ModelCost,
    budget: Budget,
    *,
    most_steps: int,
    seed: int,
) -> SimulatedDrift:
    """Train each set of blocks on a window of a domain, within a budget; errors are those of other samples of it.

    Args:
        kind: what was done to the samples; drifts of one kind are held out together.
        model: source model, which changes.
        window: samples of the domain to train on.
        test: other samples of it.
        loss: loss of the training.
        error: error that is to fall.
        settings: settings of the training.
        cost: costs of the model's parts.
        budget: budget of the window.
        most_steps: largest number of steps.
        seed: seed of the order of samples.
    """
    parts = parts_of(model, window.select(slice(0, 2)).inputs)
    found = estimate(model, parts, window, loss, error, settings, cost, budget, seed)
    some = window.select(slice(0, gain_samples(cost, budget, len(window))))
    gains = block_gains(model, parts, some, loss).blocks  # the law's, not the edge's: it does not pay for them
    after = {name: one.detach().clone() for name, one in model.named_parameters()}
    late = {"head_lr": settings.late_head_lr} if found.head_steps else {}
    settings = settings.model_copy(update={"head_steps": 0, **late})
    terms = Terms(batch=settings.batch_size, samples=len(window), spent=found.cost)
    pilots = []
    for blocks in sets_of_blocks(len(block_list_of(model).blocks)):
        steps = affordable_steps(cost, training_choices(cost, blocks), budget, most=most_steps, **terms)
        model.load_state_dict(after, strict=False)
        retrain_blocks(model, parts, blocks, window, loss, settings, steps=steps, seed=seed)
        pilots.append(Pilot(blocks, steps, len(window), mean_error(model, test, error)))
    magnitude, snr = (tuple(getattr(one, name) for one in gains) for name in ("magnitude", "snr"))
    return SimulatedDrift(kind, found.error, magnitude, snr, tuple(pilots))
