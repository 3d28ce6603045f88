"""What the edge does in any topology: its first part, and the steps of training with micro-batches on their way."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from raycloud.data.batches import Batch
from raycloud.errors import LinkError, TrainingError
from raycloud.link.frames import Frame, Kind, split_off, with_bytes
from raycloud.models.segments import Segment
from raycloud.split.finetune.memory import Memory
from raycloud.split.finetune.messages import Backwarded, Optimise, Optimised
from raycloud.split.finetune.numbers import Coded, Packings
from raycloud.split.finetune.state import load_state, put, state_of
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
class Micro:
    """A micro-batch on its way."""

    number: int
    batch: Batch
    last: bool
    """Whether it is the step's last one."""
    numbers: Tensor
    """What the first part made of it; its gradient is to come."""
    turned: bool = False
    """Whether it is on its second way, as a gradient."""


@dataclass(frozen=True)
class Learning:
    """Which parts learn, and so which gradients cross."""

    ahead: bool = True
    """The first part or its end of the code."""
    cloud: bool = True


class Front(ABC):
    """The part of a model ahead of the first cut, and the training loop.

    While a micro-batch is away, others are worked on. Where each goes out twice, at most half of the depth (rounded up)
    are on their first way, or each gradient would wait behind all that was sent ahead of it. Each part adds gradients
    up in the order of the micro-batches, so the depth of the pipeline changes nothing (where first and last part share
    the embedding, the order in which both add to it, and so a rounding).

    Args:
        first: blocks [0, first) with the embedding.
        encoder: of the first cut.
        packings: of both cuts.
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
        packings: Packings,
        cloud: Cloud,
        trainer: Trainer,
        *,
        learning: Learning,
        seed: int,
        depth: int = 1,
    ) -> None:
        self.first, self.encoder = first, encoder
        self.packings, self.cloud, self.trainer = packings, cloud, trainer
        self.learning, self.seed, self._depth = learning, seed, depth
        self.memory = Memory(packings)
        self.clock = Clock()
        self.ended: int | None = None
        """Rounds that the group had ended when last heard; None for an edge that trains by itself."""
        self._spoiled = False
        self._theirs = 0.0
        """The norm of the cloud's gradients of this step, once known."""
        self._unsettled = False
        """Whether the answer to an OPT is still to come: ahead of all others."""
        self._parts: dict[str, nn.Module] = {f"block {place}": block for place, block in enumerate(first.blocks)}

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """By the names that their parameters are saved under."""
        return {"first": self.first, "encoder": self.encoder}

    @property
    @abstractmethod
    def _twice(self) -> bool:
        """Whether a micro-batch goes out a second time, as a gradient."""

    @abstractmethod
    def fit(self, batches: Sequence[Batch]) -> None:
        """Have the cloud fit what it has of codes to what it makes of batches; before the first step.

        Raises:
            LinkError: the cloud is gone or refuses.
        """

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """What the task's head says of a batch, dropout off."""

    @abstractmethod
    def crossing(self, step: int, micros: Sequence[Sequence[int]], learning: Learning | None = None) -> Counter[str]:
        """Bytes of a step by kind of message, told from the tokens of each micro-batch's texts alone.

        Args:
            step: its number.
            micros: for each micro-batch the tokens of its texts.
            learning: which parts learn, if others than those that do.
        """

    @abstractmethod
    def _request(self, micro: Micro, targets: int) -> Frame:
        """What a micro-batch of a step with so many targets is sent as."""

    @abstractmethod
    def _turn(self, micro: Micro, answer: Frame, sums: Sums) -> bool:
        """Take the answer to that; whether the cloud was sent a gradient, whose answer goes to :meth:`_end`."""

    def _room(self, away: Sequence[Micro]) -> bool:
        """Whether one more micro-batch may be on its way."""
        abreast = (self._depth + 1) // 2 if self._twice else self._depth
        return len(away) < self._depth and sum(not micro.turned for micro in away) < abreast

    def step(self, batches: Sequence[Batch]) -> Step:
        """One optimiser step of both sides over micro-batches.

        Raises:
            TrainingError: the gradients were not finite too many times in a row, or nothing is labelled.
            LinkError: the cloud is gone or refuses.
        """
        sums = self.trainer.begin(batches)
        todo = deque(enumerate(batches))
        away: deque[Micro] = deque()
        self._theirs, self._spoiled = 0.0, False
        while todo or away:
            while todo and self._room(away):
                number, batch = todo.popleft()
                away.append(self._begin(number, batch, not todo, sums.tokens))
            micro = away.popleft()
            answer = self._receive()
            if micro.turned:
                self._end(micro, *split_off(answer, Backwarded))
            elif self._turn(micro, answer, sums):
                micro.turned = True
                away.append(micro)
        norm = math.inf if self._spoiled else math.hypot(self.trainer.gradient_norm(), self._theirs)
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

    def _begin(self, number: int, batch: Batch, last: bool, targets: int) -> Micro:
        with self._working(), torch.set_grad_enabled(self.learning.ahead):
            micro = Micro(number, batch, last, self._ahead(batch, number, training=True))
            request = self._request(micro, targets)
        self.cloud.send(request)
        return micro

    def _end(self, micro: Micro, told: Backwarded, payload: bytes) -> None:
        """The gradient of the first part, if it learns; the norm of the cloud's, if this was the last of the step."""
        self.clock.cloud += told.seconds
        if self.learning.ahead:
            with self._working():
                try:
                    coded = Coded(told.unit, payload)
                    gradient = self.packings.first.unpack(coded, len(micro.numbers), by_chance=True)
                except ValueError as error:
                    raise unusable(error) from None
                micro.numbers.backward(gradient.to(micro.numbers))
        self._theirs = max(self._theirs, told.norm)

    def _ahead(self, batch: Batch, number: int, *, training: bool) -> Tensor:
        """Numbers (n, width) of the valid tokens at the first cut."""
        with self._mode(number, training):
            rows = self.first.rows(batch.ids, valid=valid_or_none(batch), types=batch.types)
            return self.encoder(rows[batch.valid])

    def _numbers(self, numbers: Tensor, batch: Batch, *, training: bool) -> tuple[Coded, bytes]:
        """A batch's numbers, coded, and ahead of them in a payload which texts they are, where changes cross."""
        places = self._places(batch) if training else []
        which = self.memory.announce(places)
        try:
            return self.memory.pack("first", numbers, places, lengths_of(batch)), which
        except ValueError as error:
            raise diverged(self.trainer.step_index, error) from None

    def _places(self, batch: Batch) -> Sequence[int]:
        """Which texts a batch of a step is, where that matters."""
        if not self.memory.kept:
            return []
        if batch.places is None:
            raise ValueError("changes of texts cross, and the batch does not say which texts it is")
        return batch.places

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


def diverged(step: int, error: ValueError) -> TrainingError:
    """What is said where rows cannot cross a cut any more, though all gradients were finite."""
    return TrainingError(f"step {step}: {error}; a smaller training.lr may help")


def unusable(error: ValueError) -> LinkError:
    """What an edge says of numbers that are not what was agreed on."""
    return LinkError(f"the cloud's numbers cannot be used: {error}")


def lengths_of(batch: Batch) -> list[int]:
    """The tokens of each text."""
    lengths: list[int] = batch.valid.sum(dim=1).tolist()
    return lengths


def valid_or_none(batch: Batch) -> Tensor | None:
    """Which tokens are no padding, None if none is."""
    return None if bool(batch.valid.all()) else batch.valid
