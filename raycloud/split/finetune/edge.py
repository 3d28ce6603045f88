"""The edge's side of split fine-tuning: tokens, labels, first and last part, head and loss."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from raycloud.data.batches import Batch
from raycloud.errors import LinkError
from raycloud.link.frames import Frame, Kind, split_off, with_bytes
from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from raycloud.split.finetune.cloud import CloudSide
from raycloud.split.finetune.code import Decoder, load_decoder
from raycloud.split.finetune.crossing import crossing
from raycloud.split.finetune.front import Cloud, Front, Learning, Micro, diverged, lengths_of, unusable
from raycloud.split.finetune.messages import Backward, Fit, Fitted, Forward, Forwarded, Piece
from raycloud.split.finetune.numbers import Coded, Packings
from raycloud.split.finetune.state import Checkpoints
from raycloud.split.finetune.tasks import Pooling, Task, outputs_of
from raycloud.training.loop import Sums, Trainer


class LocalCloud:
    """The other side in the same process; what would cross is counted by kind, headers included.

    Nothing is packed, so what no frame of a link could hold passes here.
    """

    def __init__(self, side: CloudSide, meter: Meter | None = None, kept: Checkpoints | None = None) -> None:
        self.side, self.meter, self.kept = side, meter or Meter(), kept
        self._answers: deque[Frame] = deque()

    def send(self, request: Frame) -> None:
        """Answer it at once.

        Raises:
            TrainingError: the rows are not finite any more.
        """
        try:
            answer = self.side.answer(request)
        except ValueError as error:
            raise diverged(self.side.step, error) from None
        for frame in (request, answer):
            self.meter.add(frame.kind.name, frame.size)
        self._answers.append(answer)

    def receive(self) -> Frame:
        """The oldest answer."""
        return self._answers.popleft()

    def save(self, step: int) -> None:
        """Keep it, if there is where to."""
        if self.kept is not None:
            self.kept.save(step, self.side.state())

    def close(self) -> None:
        """Nothing outlives the object."""


class EdgeSide(Front):
    """The parts of a model that stay with the text; rows cross two cuts, and labels none.

    A micro-batch goes out, comes back, goes out as a gradient and comes back as one.

    Args:
        first: blocks [0, first) with the embedding.
        encoder: of the first cut.
        decoder: of the second one.
        last: blocks [second, L) with what follows them.
        task: the head and its loss.
        packings: of both cuts.
        back: what of a text's rows the cloud sends back; ``rows`` if the task pools them itself.
        cloud: the other side.
        trainer: of everything here that learns.
        learning: which parts do.
        seed: of dropout and of rounding.
        depth: micro-batches that may be away at once.
    """

    def __init__(
        self,
        first: Segment,
        encoder: nn.Module,
        decoder: nn.Module,
        last: Segment,
        task: Task,
        packings: Packings,
        back: Pooling,
        cloud: Cloud,
        trainer: Trainer,
        *,
        learning: Learning,
        seed: int,
        depth: int = 1,
    ) -> None:
        super().__init__(first, encoder, packings, cloud, trainer, learning=learning, seed=seed, depth=depth)
        self.decoder, self.last, self.task, self.back = decoder, last, task, back
        self._parts |= {f"block {last.lo + place}": block for place, block in enumerate(last.blocks)}
        self._parts["head"] = task.head

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """By the names that their parameters are saved under."""
        return {**super().modules, "decoder": self.decoder, "last": self.last, "head": self.task.head}

    @property
    def _twice(self) -> bool:
        return self.learning.cloud or self.learning.ahead

    @torch.no_grad()
    def fit(self, batches: Sequence[Batch]) -> None:
        """Have the cloud fit the second cut's code, if it has one, to what it makes of batches; before the first step.

        Raises:
            LinkError: the cloud is gone, refuses, or sends no decoder.
        """
        if not isinstance(self.decoder, Decoder):
            return
        for number, batch in enumerate(batches):
            numbers = self._ahead(batch, number, training=False)
            coded = self.packings.first.pack(numbers)
            last = number == len(batches) - 1
            ours = Fit(lengths=lengths_of(batch), last=last, unit=coded.unit)
            self.cloud.send(with_bytes(Kind.FIT, ours, coded.payload, rows=len(numbers)))
            split_off(self._receive(), Fitted)
        packed, size = bytearray(), 1
        while len(packed) < size:
            self.cloud.send(with_bytes(Kind.CODE, Piece(up=False, at=len(packed), size=0)))
            told, some = split_off(self._receive(), Piece)
            if not some:
                raise LinkError("the cloud's code cannot be used: it has no bytes")
            size = told.size
            packed += some
        try:
            load_decoder(self.decoder, bytes(packed))
        except ValueError as error:
            raise LinkError(f"the cloud's code cannot be used: {error}") from None

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """What the task's head says of a batch, dropout off."""
        numbers = self._ahead(batch, 0, training=False)
        self.cloud.send(self._forward(batch, numbers, 0, training=False))
        told, payload = split_off(self._receive(), Forwarded)
        self.clock.cloud += told.seconds
        return self._behind(self._arrived(told.unit, payload, batch, []), batch, 0, training=False)

    def crossing(self, step: int, micros: Sequence[Sequence[int]], learning: Learning | None = None) -> Counter[str]:
        """Bytes of a step by kind of message."""
        return crossing(step, micros, self.packings, self.back, learning or self.learning)

    def _request(self, micro: Micro, targets: int) -> Frame:
        return self._forward(micro.batch, micro.numbers, micro.number, training=True)

    def _turn(self, micro: Micro, answer: Frame, sums: Sums) -> bool:
        """Loss and gradient at the second cut."""
        told, payload = split_off(answer, Forwarded)
        self.clock.cloud += told.seconds
        with self._working():
            leaf = self._arrived(told.unit, payload, micro.batch, self._places(micro.batch)).requires_grad_()
            outputs = self._behind(leaf, micro.batch, micro.number, training=True)
            loss = self.task.loss(outputs, micro.batch)
            (loss.sum / sums.tokens).backward()
            sums.add(loss)
            if not self._twice:
                return False
            assert leaf.grad is not None
            # What is no number must not cross: the norm tells both sides to skip the step.
            self._spoiled |= not bool(leaf.grad.isfinite().all())
            given = leaf.grad.nan_to_num(0.0, 0.0, 0.0)
            coded = self.packings.second.pack(given, self._chance(micro.number, "second"))
            ours = Backward(
                step=self.trainer.step_index,
                micro=micro.number,
                last=micro.last,
                back=self.learning.ahead,
                unit=coded.unit,
            )
        self.cloud.send(with_bytes(Kind.BWD, ours, coded.payload, rows=len(leaf)))
        return True

    def _behind(self, numbers: Tensor, batch: Batch, number: int, *, training: bool) -> Tensor:
        """The task's outputs from the numbers at the second cut."""
        with self._mode(number, training):
            return outputs_of(self.task, self.last, self.decoder(numbers), batch, self.back)

    def _forward(self, batch: Batch, numbers: Tensor, number: int, *, training: bool) -> Frame:
        coded, which = self._numbers(numbers, batch, training=training)
        ours = Forward(
            step=self.trainer.step_index,
            micro=number,
            training=training,
            returns=training and self._twice,
            lengths=lengths_of(batch),
            unit=coded.unit,
        )
        return with_bytes(Kind.FWD, ours, which + coded.payload, rows=len(numbers))

    def _arrived(self, unit: float, payload: bytes, batch: Batch, places: Sequence[int]) -> Tensor:
        counts = lengths_of(batch) if self.back == "rows" else [1] * len(batch.ids)
        try:
            numbers = self.memory.unpack("second", Coded(unit, payload), places, counts)
        except ValueError as error:
            raise unusable(error) from None
        return numbers.to(batch.ids.device)
