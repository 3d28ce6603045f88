"""The topology in which the cloud has the last part, the head, the loss, and so the labels.

A micro-batch takes one round trip instead of two and no second cut. What it costs is the point of all else here: the
cloud reads what every text was labelled as, and what the model says of it. It must be asked for at both sides.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from raycloud.data.batches import IGNORE, Batch
from raycloud.link.frames import Frame, Kind, split_off, with_bytes
from raycloud.models.segments import Segment
from raycloud.split.finetune.cloud import CloudSide, OutOfStep, valid_of
from raycloud.split.finetune.crossing import LABEL_BYTES, crossing_with_labels
from raycloud.split.finetune.front import Cloud, Front, Learning, Micro, lengths_of, unusable
from raycloud.split.finetune.messages import Judge, Judged, Learn, Learnt, Rows
from raycloud.split.finetune.numbers import Coded, Packings
from raycloud.split.finetune.tasks import Pooling, Task, TaskTerms, outputs_of
from raycloud.training.loop import Sums, Trainer

WARNING = (
    "labels=cloud: the cloud is sent the label of every text that is learned from, and computes what the model says of "
    "every text. labels=edge keeps both at the edge"
)


def _pack(labels: Tensor, terms: TaskTerms) -> bytes:
    return labels.cpu().numpy().astype(_dtype(terms)).tobytes()


def _unpack(raw: bytes, terms: TaskTerms, texts: int) -> Tensor:
    labels = torch.from_numpy(np.frombuffer(raw, _dtype(terms)).copy())
    if len(labels) != texts * terms.labels:
        raise ValueError(f"{len(labels)} labels came for {texts} texts of {terms.labels}")
    if labels.is_floating_point():
        return labels
    return labels.long() if terms.labels == 1 else labels.long().reshape(texts, terms.labels)


def _dtype(terms: TaskTerms) -> np.dtype:
    return np.dtype("<f4" if terms.kind == "regression" else "<i4")


class LabelledEdge(Front):
    """The edge's side: texts, and the part of the model ahead of the cut.

    Args:
        first: as in :class:`~raycloud.split.finetune.front.Front`, and so are all others.
        terms: of the cloud's head.
    """

    def __init__(
        self,
        first: Segment,
        encoder: nn.Module,
        terms: TaskTerms,
        packings: Packings,
        cloud: Cloud,
        trainer: Trainer,
        *,
        seed: int,
        depth: int = 1,
    ) -> None:
        super().__init__(first, encoder, packings, cloud, trainer, learning=Learning(), seed=seed, depth=depth)
        self._terms = terms

    @property
    def _twice(self) -> bool:
        return False

    def fit(self, batches: Sequence[Batch]) -> None:
        """Nothing: there is no second cut."""

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """What the cloud's head says of a batch, dropout off."""
        numbers = self._ahead(batch, 0, training=False)
        coded, _ = self._numbers(numbers, batch, training=False)
        ours = Judge(lengths=lengths_of(batch), unit=coded.unit)
        self.cloud.send(with_bytes(Kind.JUDGE, ours, coded.payload, rows=len(numbers)))
        told, payload = split_off(self._receive(), Judged)
        self.clock.cloud += told.seconds
        if told.shape[0] != len(batch.ids) or len(payload) != 4 * prod(told.shape):
            raise unusable(ValueError(f"{len(payload)} bytes are not {told.shape} of {len(batch.ids)} texts"))
        return torch.frombuffer(bytearray(payload), dtype=torch.float32).reshape(told.shape).to(batch.ids.device)

    def crossing(self, step: int, micros: Sequence[Sequence[int]], learning: Learning | None = None) -> Counter[str]:
        """Bytes of a step by kind of message."""
        return crossing_with_labels(step, micros, self.packings, self._terms.labels)

    def _request(self, micro: Micro, targets: int) -> Frame:
        batch = micro.batch
        coded, which = self._numbers(micro.numbers, batch, training=True)
        ours = Learn(
            step=self.trainer.step_index,
            micro=micro.number,
            last=micro.last,
            targets=targets,
            lengths=lengths_of(batch),
            unit=coded.unit,
        )
        return with_bytes(
            Kind.LEARN, ours, _pack(batch.labels, self._terms) + which + coded.payload, rows=len(micro.numbers)
        )

    def _turn(self, micro: Micro, answer: Frame, sums: Sums) -> bool:
        told, payload = split_off(answer, Learnt)
        sums.total += told.loss
        self._end(micro, told, payload)
        return False


class LabelledCloud(CloudSide):
    """The cloud's side: all that follows the cut, with head, loss and labels.

    Args:
        middle: blocks [first, L).
        decoder: of the cut.
        last: what follows the blocks.
        terms: of the head.
        task: the head and its loss, see :meth:`~raycloud.split.finetune.tasks.TaskTerms.task`.
        packings: of the cut, and of a second one that nothing crosses.
        back: what of a text's rows goes from the blocks to what follows them.
        trainer: of all of it.
        seed: of dropout and of rounding, the edge's.
    """

    def __init__(
        self,
        middle: Segment,
        decoder: nn.Module,
        last: Segment,
        terms: TaskTerms,
        task: Task,
        packings: Packings,
        back: Pooling,
        trainer: Trainer | None,
        seed: int,
    ) -> None:
        super().__init__(middle, decoder, nn.Identity(), packings, back, trainer, seed)
        self.last, self.task, self._terms = last, task, terms
        self._parts["head"] = task.head

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """By the names that their parameters are saved under."""
        return {**super().modules, "last": self.last, "head": self.task.head}

    def answer(self, request: Frame) -> Frame:
        """What one message leads to; see :meth:`~raycloud.split.finetune.cloud.CloudSide.answer`."""
        started = time.perf_counter()
        match request.kind:
            case Kind.LEARN:
                return self._learn(*split_off(request, Learn), started)
            case Kind.JUDGE:
                return self._judge(*split_off(request, Judge), started)
            case Kind.OPT | Kind.CODE:
                return super().answer(request)
            case _:
                raise OutOfStep(f"{request.kind.name} has no place where labels are the cloud's")

    def _learn(self, asked: Learn, payload: bytes, started: float) -> Frame:
        if asked.step != self.step:
            raise OutOfStep(f"labels of step {asked.step} came in step {self.step}")
        size, texts = LABEL_BYTES * self._terms.labels * len(asked.lengths), len(asked.lengths)
        labels, payload = _unpack(payload[:size], self._terms, texts).to(self._device), payload[size:]
        places, payload = self._which(asked, payload)
        coded = Coded(asked.unit, payload)
        numbers = self.memory.unpack("first", coded, places, asked.lengths).to(self._device).requires_grad_()
        with torch.enable_grad(), self._mode(training=True, step=asked.step, micro=asked.micro):
            outputs, batch = self._said(numbers, asked, labels)
            self._check(labels, outputs)
            loss = self.task.loss(outputs, batch)
            (loss.sum / asked.targets).backward()
        coded = self._gradient(numbers, asked.step, asked.micro)
        told = Learnt(
            unit=coded.unit,
            norm=self._norm(asked.last),
            loss=float(loss.sum.detach()),
            seconds=time.perf_counter() - started,
        )
        return with_bytes(Kind.LEARN_OK, told, coded.payload, rows=len(numbers))

    @torch.no_grad()
    def _judge(self, asked: Judge, payload: bytes, started: float) -> Frame:
        coded = Coded(asked.unit, payload)
        numbers = self.packings.first.unpack(coded, sum(asked.lengths)).to(self._device)
        with self._mode(training=False):
            outputs, _ = self._said(numbers, asked, torch.empty(0))
        told = Judged(shape=list(outputs.shape), seconds=time.perf_counter() - started)
        return with_bytes(Kind.JUDGE_OK, told, outputs.float().cpu().numpy().tobytes())

    def _said(self, numbers: Tensor, asked: Rows, labels: Tensor) -> tuple[Tensor, Batch]:
        """What the head says, and the batch as the cloud knows it: without token ids."""
        lengths = torch.tensor(asked.lengths, device=self._device)
        batch = Batch(torch.empty(0), valid_of(lengths), labels)
        return outputs_of(self.task, self.last, self._through(numbers, lengths), batch, self.pooling), batch

    def _check(self, labels: Tensor, outputs: Tensor) -> None:
        if labels.is_floating_point():
            sound = labels.isfinite()
        else:
            sound = (labels == IGNORE) | ((labels >= 0) & (labels < outputs.shape[1]))
        if not bool(sound.all()):
            raise ValueError(f"label {labels[~sound][0].item()}; allowed: 0 to {outputs.shape[-1] - 1}, or finite")
