"""Training of chosen blocks of a model at an edge, with the frozen blocks before them run once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.data.batches import SampleOrder
from raycloud.models.block_trace import without_cache
from raycloud.models.frozen_prefix import Boundary, FrozenPrefix
from raycloud.retrain.meter import MeteredCost, measured, training_state_bytes
from raycloud.retrain.parts import trainable_only
from raycloud.retrain.recipe import RetrainTraining
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import LossOf
from raycloud.training.loop import Loss, Step, Trainer


@dataclass(frozen=True)
class Retrained:
    """Result of a training of blocks."""

    steps: int
    losses: list[float]
    """Mean loss of each step."""
    flops: int
    """Metered operations: the frozen blocks once for each sample, and all steps."""
    memory: int
    """Largest number of bytes held: parameters, gradients and moments, kept outputs of frozen blocks, and what autograd
    kept for a backward."""


@dataclass(frozen=True)
class RecordedSamples:
    """Samples whose frozen blocks have run, so that several trainings share that."""

    samples: Samples
    prefix: FrozenPrefix
    boundary: Boundary
    flops: int
    """Metered operations of the frozen blocks."""

    @classmethod
    def of(cls, model: PreTrainedModel, start: int, samples: Samples, batch_size: int) -> RecordedSamples:
        """Run the blocks of a model before block ``start``."""
        prefix = FrozenPrefix(model.eval(), start)
        boundary, flops = _recorded(model, prefix, samples, batch_size)
        return cls(samples, prefix, boundary, flops)

    def select(self, rows: Tensor) -> RecordedSamples:
        """Samples with some of the numbers."""
        return RecordedSamples(self.samples.select(rows), self.prefix, self.boundary.select(rows), self.flops)


def _recorded(model: PreTrainedModel, prefix: FrozenPrefix, samples: Samples, batch_size: int) -> tuple[Boundary, int]:
    """What a prefix hands on for samples, and the operations of it."""
    parts, flops, each = [], 0, dict[int, int]()
    for batch in samples.batches(batch_size):
        if len(batch) in each:
            parts.append(prefix.record(batch.inputs))
        else:
            with measured(model) as cost:
                parts.append(prefix.record(batch.inputs))
            each[len(batch)] = cost.flops
        flops += each[len(batch)]
    return Boundary.cat(parts), flops


@dataclass(frozen=True)
class _Batch:
    samples: Samples
    boundary: Boundary

    @property
    def targets(self) -> int:
        return len(self.samples)


class _Group(nn.Module):
    """Parameters of an optimiser group; they keep their own modules."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)


class BlockTrainer:
    """Trains some parameters of a model; everything else stays bit for bit.

    The model runs in evaluation mode, without dropout, so that the frozen blocks before block ``start`` compute the
    same in every step and run once for each sample.

    Args:
        model: the edge's model.
        groups: parameters to train: ``head``, which has a learning rate of its own, and ``blocks``; see
            :meth:`~raycloud.retrain.parts.RetrainParts.groups`.
        samples: samples of the window; if the blocks before ``start`` have run for them, they do not run again.
        loss: loss of logits and labels.
        settings: settings of the training.
        start: number of the first block that runs in every step, not above the lowest one with trained parameters.
        steps: number of steps.
        seed: seed of the order of samples.
        replayed: source samples that make up a share of each batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Mapping[str, Mapping[str, nn.Parameter]],
        samples: Samples | RecordedSamples,
        loss: LossOf,
        settings: RetrainTraining,
        *,
        start: int,
        steps: int,
        seed: int,
        replayed: Samples | None = None,
    ) -> None:
        self._model, self._loss, self._settings, self._steps = model.eval(), loss, settings, steps
        self._known = samples if isinstance(samples, RecordedSamples) else None
        self._prefix = FrozenPrefix(model, start) if self._known is None else self._known.prefix
        samples = samples.samples if isinstance(samples, RecordedSamples) else samples
        self._trainable: Sequence[nn.Parameter] = [one for group in groups.values() for one in group.values()]
        replay = round(settings.replay * settings.batch_size) if replayed is not None else 0
        self._sources = [(samples, SampleOrder([1] * len(samples), settings.batch_size - replay, seed))]
        if replayed is not None and replay:
            self._sources.append((replayed, SampleOrder([1] * len(replayed), replay, seed + 1)))
        self._boundaries: list[Boundary] = []
        with trainable_only(model, self._trainable):
            self._trainer = Trainer(
                {name: _Group(group) for name, group in groups.items()},
                settings.training(),
                total_steps=steps,
                seed=seed,
                lr={"head": settings.head_lr},
            )

    def run(self, on_step: Callable[[Step], None] = lambda step: None) -> Retrained:
        """Train.

        Args:
            on_step: called after every step.

        Raises:
            TrainingError: gradients stayed non-finite.
        """
        losses: list[float] = []
        costs: dict[Hashable, MeteredCost] = {}  # steps that train the same parameters cost the same
        flops, held = 0, 0
        for step in range(self._steps):
            kind, parameters = self._trained_in(step)
            with trainable_only(self._model, parameters):
                if not step:
                    flops = self._record()
                batch = self._batch(step)
                if kind in costs:
                    done = self._trainer.step([batch], self._loss_of)
                else:
                    with measured(self._model, tuple(batch.samples.inputs.values())) as cost:
                        done = self._trainer.step([batch], self._loss_of)
                    costs[kind] = cost
                    state = training_state_bytes(sum(one.numel() for one in parameters))
                    held = max(held, cost.kept + state)
                flops += costs[kind].flops
            losses.append(done.loss)
            self._after(done)
            on_step(done)
        parameters_bytes = sum(one.nbytes for one in self._model.parameters())
        cache = sum(one.nbytes for one in self._boundaries)
        return Retrained(len(losses), losses, flops, parameters_bytes + cache + held)

    def _trained_in(self, step: int) -> tuple[Hashable, Sequence[nn.Parameter]]:
        """Parameters that a step trains, and a key that steps with the same ones share."""
        return None, self._trainable

    def _after(self, step: Step) -> None:
        """Use the result of a step for the choice of the next ones."""

    def _record(self) -> int:
        """Record what the frozen blocks hand on, and return the operations of it."""
        flops, self._boundaries = 0, []
        for samples, _ in self._sources:
            if self._known is not None and not self._boundaries:
                self._boundaries.append(self._known.boundary)
                continue
            boundary, spent = _recorded(self._model, self._prefix, samples, self._settings.batch_size)
            self._boundaries.append(boundary)
            flops += spent
        return flops

    def _batch(self, step: int) -> _Batch:
        chosen, given = [], []
        for (samples, order), boundary in zip(self._sources, self._boundaries, strict=True):
            rows = torch.tensor(order.indices(step))
            chosen.append(samples.select(rows))
            given.append(boundary.select(rows))
        return _Batch(Samples.cat(chosen), Boundary.cat(given))

    def _loss_of(self, batch: _Batch) -> Loss:
        loss = self._loss(self._prefix.run(batch.boundary, batch.samples.inputs).logits, batch.samples.labels)
        # The mean over the loss's own positions, whatever their number.
        return Loss(loss.sum / max(loss.count, 1) * batch.targets, batch.targets, {})


def mean_error(model: PreTrainedModel, samples: Samples, error: LossOf, batch_size: int = 64) -> float:
    """Mean error of a model over samples, without gradients."""
    total, count = 0.0, 0
    model.eval()
    arguments = without_cache(model)
    with torch.no_grad():
        for batch in samples.batches(batch_size):
            found = error(model(**batch.inputs, **arguments).logits, batch.labels)
            total, count = total + float(found.sum), count + found.count
    return total / max(count, 1)
