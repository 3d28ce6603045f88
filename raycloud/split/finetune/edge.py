"""The edge's side of split fine-tuning: tokens, labels, first and last part, head and loss; and who does what when."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from raycloud.data.batches import Batch
from raycloud.errors import LinkError
from raycloud.link.frames import Frame, Kind, split_off, with_bytes
from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from raycloud.split.finetune.cloud import CloudSide
from raycloud.split.finetune.code import Decoder, load_decoder
from raycloud.split.finetune.memory import Memory
from raycloud.split.finetune.messages import (
    Backward,
    Backwarded,
    Fit,
    Fitted,
    Forward,
    Forwarded,
    Optimise,
    Optimised,
    Piece,
)
from raycloud.split.finetune.numbers import Coded, Packing, Packings
from raycloud.split.finetune.state import Checkpoints, load_state, put, state_of
from raycloud.split.finetune.tasks import Pooling, Task, pooled
from raycloud.training.draws import drawing, seed_of
from raycloud.training.loop import Step, Sums, Trainer


class Cloud(Protocol):
    """The other side. Answers come in the order of the requests."""

    def send(self, request: Frame) -> None:
        """Begin a request; FIT, FWD, BWD or OPT, and GIVE, ROUND or TAKE where edges train together."""
        ...

    def receive(self) -> Frame:
        """The answer to the oldest request that has none yet."""
        ...

    def save(self, step: int) -> None:
        """Have it keep what this step goes on from; it is kept when this returns."""
        ...

    def close(self) -> None:
        """Let it go."""
        ...


class LocalCloud:
    """The other side in the same process; what would cross is counted by kind, headers included."""

    def __init__(self, side: CloudSide, meter: Meter | None = None, kept: Checkpoints | None = None) -> None:
        self.side, self.meter, self.kept = side, meter or Meter(), kept
        self._answers: deque[Frame] = deque()

    def send(self, request: Frame) -> None:
        """Answer it at once."""
        answer = self.side.answer(request)
        for frame in (request, answer):
            self.meter.add(frame.kind.name, len(frame.pack()))
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


@dataclass
class Clock:
    """Where the seconds of the steps since it was new went."""

    edge: float = 0.0
    """The edge computed."""
    cloud: float = 0.0
    """The cloud computed, whether or not the edge waited for it."""
    waiting: float = 0.0
    """The edge waited for an answer."""


@dataclass
class _Micro:
    """A micro-batch on its way."""

    number: int
    batch: Batch
    numbers: Tensor
    """What the first part made of it; its gradient is to come."""


@dataclass(frozen=True)
class Learning:
    """Which parts learn, and so which gradients cross."""

    ahead: bool = True
    """The first part or its end of the code."""
    cloud: bool = True


class EdgeSide:
    """The parts of a model that stay with the text, and the training loop.

    A micro-batch goes out, comes back, goes out as a gradient and comes back as one; while it is away, others are
    worked on. Each part adds gradients up in the order of the micro-batches, so the depth of the pipeline changes
    nothing (where first and last part share the embedding, the order in which both add to it, and so a rounding).

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
        self.first, self.encoder, self.decoder, self.last, self.task = first, encoder, decoder, last, task
        self.packings, self.back, self.cloud, self.trainer = packings, back, cloud, trainer
        self.learning, self.seed, self._depth = learning, seed, depth
        self.memory = Memory(packings)
        self.clock = Clock()
        self.ended: int | None = None
        """Rounds that the group had ended when last heard; None for an edge that trains by itself."""
        self._spoiled = False
        self._unsettled = False
        """Whether the answer to an OPT is still to come: ahead of all others."""
        self._parts: dict[str, nn.Module] = {}
        for segment in (first, last):
            self._parts |= {f"block {segment.lo + place}": block for place, block in enumerate(segment.blocks)}
        self._parts["head"] = task.head

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """By the names that their parameters are saved under."""
        return {
            "first": self.first,
            "encoder": self.encoder,
            "decoder": self.decoder,
            "last": self.last,
            "head": self.task.head,
        }

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
            ours = Fit(lengths=_lengths(batch), last=last, unit=coded.unit)
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

    def step(self, batches: Sequence[Batch]) -> Step:
        """One optimiser step of both sides over micro-batches.

        Raises:
            TrainingError: the gradients were not finite too many times in a row, or nothing is labelled.
            LinkError: the cloud is gone or refuses.
        """
        sums = self.trainer.begin(batches)
        todo = deque(enumerate(batches))
        away: deque[tuple[Literal["forward", "backward"], _Micro]] = deque()
        theirs = 0.0
        self._spoiled = False
        while todo or away:
            while todo and len(away) < self._depth:
                number, batch = todo.popleft()
                away.append(("forward", self._begin(number, batch)))
            what, micro = away.popleft()
            answer = self._receive()
            if what == "backward":
                theirs = max(theirs, self._end(micro, answer))
            elif self._turn(micro, answer, sums, last=micro.number == len(batches) - 1):
                away.append(("backward", micro))
        norm = math.inf if self._spoiled else math.hypot(self.trainer.gradient_norm(), theirs)
        if self.learning.cloud:
            ours = Optimise(step=self.trainer.step_index, norm=norm if math.isfinite(norm) else math.inf)
            self.cloud.send(with_bytes(Kind.OPT, ours))
            self._unsettled = True
        with self._working():
            return self.trainer.finish(sums, norm)

    def settle(self) -> None:
        """Wait until the cloud has made its part of the latest step, which nothing of the next one has to wait for."""
        if self._unsettled:
            self._unsettled = False
            told, _ = split_off(self._receive(), Optimised)
            self.clock.cloud += told.seconds
            self.ended = told.ended

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, but for the cloud's side of it."""
        return {**state_of(self.modules, self.trainer), **self.memory.state()}

    def learnt(self) -> dict[str, Tensor]:
        """The weights among it."""
        return state_of(self.modules, None)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken.

        Raises:
            TrainingError: it is of other parameters.
        """
        load_state(self.modules, self.trainer, state)
        self.memory.load(state)
        self._unsettled = False

    def join(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Go on with a step from weights that a group has made of its members', the optimiser's state its own.

        Raises:
            TrainingError: they are of other parameters.
        """
        put(self.modules, weights)
        self.trainer.jump(step)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """What the task's head says of a batch, dropout off."""
        numbers = self._ahead(batch, 0, training=False)
        self.cloud.send(self._rows(batch, numbers, 0, training=False))
        told, payload = split_off(self._receive(), Forwarded)
        self.clock.cloud += told.seconds
        return self._behind(self._arrived(told.unit, payload, batch, []), batch, 0, training=False)

    def _begin(self, number: int, batch: Batch) -> _Micro:
        with self._working(), torch.set_grad_enabled(self.learning.ahead):
            numbers = self._ahead(batch, number, training=True)
            request = self._rows(batch, numbers, number, training=True)
        self.cloud.send(request)
        return _Micro(number, batch, numbers)

    def _turn(self, micro: _Micro, answer: Frame, sums: Sums, *, last: bool) -> bool:
        """Loss and gradient at the second cut; whether the cloud was sent one."""
        told, payload = split_off(answer, Forwarded)
        self.clock.cloud += told.seconds
        with self._working():
            leaf = self._arrived(told.unit, payload, micro.batch, self._places(micro.batch)).requires_grad_()
            outputs = self._behind(leaf, micro.batch, micro.number, training=True)
            loss = self.task.loss(outputs, micro.batch)
            (loss.sum / sums.tokens).backward()
            sums.add(loss)
            if not (self.learning.cloud or self.learning.ahead):
                return False
            assert leaf.grad is not None
            # What is no number must not cross: the norm tells both sides to skip the step.
            self._spoiled |= not bool(leaf.grad.isfinite().all())
            given = leaf.grad.nan_to_num(0.0, 0.0, 0.0)
            coded = self.packings.second.pack(given, self._chance(micro.number, "second"))
            ours = Backward(
                step=self.trainer.step_index,
                micro=micro.number,
                last=last,
                back=self.learning.ahead,
                unit=coded.unit,
            )
        self.cloud.send(with_bytes(Kind.BWD, ours, coded.payload, rows=len(leaf)))
        return True

    def _end(self, micro: _Micro, answer: Frame) -> float:
        """The gradient of the first part; the norm of the cloud's, if this was the last of the step."""
        told, payload = split_off(answer, Backwarded)
        self.clock.cloud += told.seconds
        if self.learning.ahead:
            with self._working():
                gradient = _unpacked(self.packings.first, Coded(told.unit, payload), len(micro.numbers))
                micro.numbers.backward(gradient.to(micro.numbers))
        return told.norm

    def _ahead(self, batch: Batch, number: int, *, training: bool) -> Tensor:
        """Numbers (n, width) of the valid tokens at the first cut."""
        with self._mode(number, training):
            rows = self.first.rows(batch.ids, valid=_valid(batch), types=batch.types)
            return self.encoder(rows[batch.valid])

    def _behind(self, numbers: Tensor, batch: Batch, number: int, *, training: bool) -> Tensor:
        """The task's outputs from the numbers at the second cut."""
        with self._mode(number, training):
            decoded = self.decoder(numbers)
            if self.back != "rows":
                return self.task.outputs(self.last.rows(decoded[:, None])[:, 0], batch)
            rows = decoded.new_zeros(*batch.valid.shape, decoded.shape[-1])
            rows[batch.valid] = decoded
            rows = self.last.rows(rows, valid=_valid(batch))
            if self.task.pooling != "rows":
                rows = pooled(rows, batch.valid, self.task.pooling)
            return self.task.outputs(rows, batch)

    def _rows(self, batch: Batch, numbers: Tensor, number: int, *, training: bool) -> Frame:
        places, lengths = self._places(batch) if training else [], _lengths(batch)
        which = self.memory.announce(places)
        coded = self.memory.pack("first", numbers, places, lengths)
        ours = Forward(
            step=self.trainer.step_index,
            micro=number,
            training=training,
            returns=training and (self.learning.ahead or self.learning.cloud),
            lengths=lengths,
            unit=coded.unit,
        )
        return with_bytes(Kind.FWD, ours, which + coded.payload, rows=len(numbers))

    def _places(self, batch: Batch) -> Sequence[int]:
        """Which texts a batch of a step is, where that matters."""
        if not self.memory.kept:
            return []
        if batch.places is None:
            raise ValueError("changes of texts cross, and the batch does not say which texts it is")
        return batch.places

    def _arrived(self, unit: float, payload: bytes, batch: Batch, places: Sequence[int]) -> Tensor:
        counts = _lengths(batch) if self.back == "rows" else [1] * len(batch.ids)
        try:
            numbers = self.memory.unpack("second", Coded(unit, payload), places, counts)
        except ValueError as error:
            raise LinkError(f"the cloud's numbers cannot be used: {error}") from None
        return numbers.to(batch.ids.device)

    def _chance(self, number: int, cut: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, self.trainer.step_index, number, cut))

    def _receive(self) -> Frame:
        self.settle()
        started = time.perf_counter()
        try:
            return self.cloud.receive()
        finally:
            self.clock.waiting += time.perf_counter() - started

    @contextmanager
    def _working(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.clock.edge += time.perf_counter() - started

    @contextmanager
    def _mode(self, number: int, training: bool) -> Iterator[None]:
        """Dropout on or off, with masks that are a function of the micro-batch."""
        for module in self.modules.values():
            module.train(training)
        with drawing(self._parts, self.seed, self.trainer.step_index, number) if training else nullcontext():
            yield


def _unpacked(packing: Packing, coded: Coded, rows: int) -> Tensor:
    try:
        return packing.unpack(coded, rows)
    except ValueError as error:
        raise LinkError(f"the cloud's numbers cannot be used: {error}") from None


def _lengths(batch: Batch) -> list[int]:
    lengths: list[int] = batch.valid.sum(dim=1).tolist()
    return lengths


def _valid(batch: Batch) -> Tensor | None:
    return None if bool(batch.valid.all()) else batch.valid
