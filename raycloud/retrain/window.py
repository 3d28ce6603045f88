"""Window of an edge: train the planned blocks, keep the result only if held-out samples say that it helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.retrain.parts import RetrainParts
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import LossOf
from raycloud.retrain.trainer import BlockTrainer, Retrained, mean_error
from raycloud.retrain.update import changes
from raycloud.training.loop import Step


@dataclass(frozen=True)
class WindowResult:
    """Result of a window."""

    before: float
    """Error on the held-out samples before training."""
    after: float
    """Error after training."""
    helped: bool
    """False if the error did not fall: the model is as it was, bit for bit, and nothing is sent."""
    deltas: dict[str, Tensor]
    """Changes of the trained weights by name; empty if the window did not help."""
    phases: tuple[Retrained, ...]
    """Trainings of the head and of the blocks."""

    @property
    def flops(self) -> int:
        """Metered operations of all trainings."""
        return sum(phase.flops for phase in self.phases)

    @property
    def memory(self) -> int:
        """Largest number of bytes held in a training."""
        return max((phase.memory for phase in self.phases), default=0)


def retrain_blocks(
    model: PreTrainedModel,
    parts: RetrainParts,
    trained: Sequence[int],
    samples: Samples,
    loss: LossOf,
    settings: RetrainTraining,
    *,
    steps: int,
    seed: int,
    replayed: Samples | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> tuple[Retrained, ...]:
    """Train the head alone, then some blocks with it; the model changes in place.

    Args:
        model: the edge's model.
        parts: its parts.
        trained: numbers of the blocks; if there are none, all steps train the head.
        samples: samples to train on.
        loss: loss of the training.
        settings: settings of the training.
        steps: number of steps with the blocks.
        seed: seed of the order of samples.
        replayed: source samples against forgetting.
        on_step: called after every step.
    """

    def phase(blocks: Sequence[int], settings: RetrainTraining, count: int) -> Retrained:
        groups, start = parts.groups(blocks), parts.lowest(blocks)
        trainer = BlockTrainer(
            model, groups, samples, loss, settings, start=start, steps=count, seed=seed, replayed=replayed
        )
        return trainer.run(on_step)

    if not trained or not settings.head_steps:
        return (phase(trained, settings, steps),)
    first = phase((), settings, settings.head_steps)
    return first, phase(trained, settings.model_copy(update={"head_lr": settings.late_head_lr}), steps)


def train_window(
    model: PreTrainedModel,
    parts: RetrainParts,
    trained: Sequence[int],
    samples: Samples,
    held_out: Samples,
    loss: LossOf,
    error: LossOf,
    settings: RetrainTraining,
    *,
    steps: int,
    seed: int,
    replayed: Samples | None = None,
    head: Mapping[str, Tensor] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> WindowResult:
    """Retrain as planned, and roll back if it does not help.

    Args:
        model: the edge's model, changed in place if the window helps.
        parts: its parts.
        trained: numbers of the planned blocks.
        samples: samples to train on.
        held_out: other samples of the window, on which the result is judged.
        loss: loss of the training.
        error: error that is to fall.
        settings: settings of the training.
        steps: planned number of steps.
        seed: seed of the order of samples.
        replayed: source samples against forgetting.
        head: weights of a head that was trained before, to begin with; None for the model's own.
        on_step: called after every step.
    """
    parameters = {name: one for group in parts.groups(trained).values() for name, one in group.items()}
    kept = {name: one.detach().clone() for name, one in parameters.items()}
    before = mean_error(model, held_out, error)
    try:
        _restore(parameters, head or {})
        done = retrain_blocks(
            model, parts, trained, samples, loss, settings, steps=steps, seed=seed, replayed=replayed, on_step=on_step
        )
        after = mean_error(model, held_out, error)
    except BaseException:
        _restore(parameters, kept)
        raise
    helped = after < before
    if not helped:
        _restore(parameters, kept)
    return WindowResult(before, after, helped, changes(parameters, kept), done)


def _restore(parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in kept.items():
            parameters[name].copy_(tensor)
