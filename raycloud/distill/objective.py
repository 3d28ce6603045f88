"""What an objective is, and the weighted sum of several in one pass over the student's logits.

Every objective is a pure function of what the student and the teacher say about response tokens, and yields a sum over
them; the trainer divides by the number of tokens of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycloud.data.batches import IGNORE, Batch
from raycloud.distill.head_loss import head_loss
from raycloud.distill.signals import FrozenHead, Signal, Targets
from raycloud.models.segments import Segment
from raycloud.recipe import Recipe
from raycloud.training.loop import Loss

TargetsAt = Callable[[float], Targets]
"""The teacher's targets for the tokens at hand, at a temperature."""


@dataclass(frozen=True)
class StudentOutput:
    """The student at the labelled positions of a batch, row-major: final rows (n, d), labels (n,), and its head."""

    rows: Tensor
    labels: Tensor
    head: nn.Linear
    softcap: float | None = None

    @classmethod
    def of(cls, student: Segment, batch: Batch) -> StudentOutput:
        """Run the student over a batch and keep the labelled rows; nothing vocabulary-sized exists before that."""
        if not isinstance(student.head, nn.Linear):
            raise ValueError("a student's head must be one linear map")
        wanted = batch.labels != IGNORE
        rows = student.rows(batch.ids, valid=None if bool(batch.valid.all()) else batch.valid)
        softcap = getattr(student.config, "final_logit_softcapping", None)
        return cls(rows[wanted], batch.labels[wanted], student.head, softcap)


class Objective(Recipe):
    """A loss per token from the student's logits; its options are its fields."""

    name: str

    def per_token(self, logits: Tensor, labels: Tensor, targets: TargetsAt) -> Tensor:
        """The loss of each token (c,), from logits (c, V), labels (c,) and the teacher's targets."""
        raise NotImplementedError


def weighted_sum(
    objectives: Sequence[tuple[float, Objective]],
    student: StudentOutput,
    signal: Signal | None = None,
    teacher_head: FrozenHead | None = None,
    *,
    chunk: int = 128,
) -> Loss:
    """Σ weight · objective over all response tokens; the terms are the raw sums by objective name.

    Args:
        objectives: weights and objectives.
        student: see :class:`StudentOutput`.
        signal: the teacher's, for the same tokens in the same order; not needed where no objective asks for it.
        teacher_head: for ``hidden`` signals.
        chunk: tokens whose logits exist at a time.

    Raises:
        ValueError: the signal speaks of another number of tokens, or an objective needs one and there is none.
    """
    count = len(student.labels)
    if signal is not None and signal.count != count:
        raise ValueError(f"the signal speaks of {signal.count} tokens, the batch has {count}")

    def terms(logits: Tensor, at: slice) -> Tensor:
        known: dict[float, Targets] = {}

        def targets(temperature: float) -> Targets:
            if signal is None:
                raise ValueError("this objective needs a teacher's signal")
            if temperature not in known:
                with torch.no_grad():
                    known[temperature] = signal.targets(at, temperature, teacher_head)
            return known[temperature]

        return torch.stack([one.per_token(logits, student.labels[at], targets).sum() for _, one in objectives])

    weights = torch.tensor([weight for weight, _ in objectives], dtype=torch.float64, device=student.rows.device)
    total, sums = head_loss(student.rows, student.head, terms, weights, softcap=student.softcap, chunk=chunk)
    return Loss(total, count, {one.name: value for (_, one), value in zip(objectives, sums, strict=True)})
