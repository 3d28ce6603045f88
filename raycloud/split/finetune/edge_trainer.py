"""Edge trainer, common to all topologies: a model's first part, and steps with micro-batches in flight."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raycloud.data.batches import Batch
from raycloud.errors import LinkError
from raycloud.link.frames import Frame, parse_body
from raycloud.models.segments import Segment
from raycloud.split.finetune.activation_cache import ActivationCache
from raycloud.split.finetune.checkpoints import load_state, load_weights, state_of, trainable_parameters
from raycloud.split.finetune.client import CloudClient, divergence_error
from raycloud.split.finetune.messages import BackwardReply, OptimiseReply, OptimiseRequest, TuneConfig, TuneKind
from raycloud.split.finetune.wire_format import EncodedTensor
from raycloud.training.loop import LossSums, Step, Trainer
from raycloud.training.seeding import derive_seed, seeded


@dataclass
class StepTimes:
    """Seconds of a trainer's work since this object was created, evaluation included."""

    edge: float = 0.0
    """Seconds in which the edge computed."""
    cloud: float = 0.0
    """Seconds in which the cloud computed, whether or not the edge waited for it."""
    waiting: float = 0.0
    """Seconds in which the edge waited for a reply."""


@dataclass
class PendingMicroBatch:
    """Micro-batch in flight."""

    number: int
    batch: Batch
    last: bool
    """True for the step's last micro-batch."""
    numbers: Tensor
    """Codes (n, width) at the first cut, whose gradient is not yet known."""
    in_backward: bool = False
    """True on its second round trip, with gradients."""


@dataclass(frozen=True)
class TrainableParts:
    """Parts that are trained, which determine the gradients to send."""

    first_part: bool = True
    """True if the first part or its end of the bottleneck is trained."""
    cloud: bool = True


class EdgeTrainer(ABC):
    """Trainer of the part of a model before the first cut, with the training loop.

    While a micro-batch is in flight, others are computed. If each takes two round trips, at most half of the depth
    (rounded up) are on their first one, or each gradient would wait for all that was sent before it. Each part adds
    gradients up in the order of the micro-batches, so the depth of the pipeline changes nothing (except, if first and
    last part share the embedding, the order in which both add to it, and so a rounding).

    Args:
        first: blocks [0, start_block) with the embedding.
        encoder: encoder of the first cut.
        config: configuration of the run. Parameters that do not require gradients are not trained.
        cloud: client of the cloud.
        max_in_flight: largest number of micro-batches in flight.
        others: other modules of this side, by the names under which their parameters are saved.
    """

    def __init__(
        self,
        first: Segment,
        encoder: nn.Module,
        config: TuneConfig,
        cloud: CloudClient,
        max_in_flight: int = 1,
        **others: nn.Module,
    ) -> None:
        self.first, self.encoder, self.config, self.cloud = first, encoder, config, cloud
        self.modules: dict[str, nn.Module] = {"first": first, "encoder": encoder, **others}
        """Modules by the names under which their parameters are saved."""
        self.wire_formats, self._max_in_flight = config.wire_formats, max_in_flight
        self.trainer = Trainer(
            self.modules,
            config.training,
            total_steps=config.total_steps,
            seed=config.seed,
            lr=config.bottleneck_lrs(uplink="encoder", downlink="decoder"),
        )
        ends_trained = bool(trainable_parameters({"first": first, "encoder": encoder}))
        # Without adapters (no block) and with a fixed bottleneck no gradient needs to be sent back.
        self.trainable = TrainableParts(first_part=ends_trained, cloud=config.train_cloud)
        self.activation_cache = ActivationCache(self.wire_formats)
        self.clock = StepTimes()
        self.ended: int | None = None
        """Rounds that the group had ended at the cloud's last message; None for an edge that trains alone."""
        self._non_finite = False
        self._cloud_norm = 0.0
        """Norm of the cloud's gradients of this step, once known."""
        self._optimise_pending = False
        """True while the reply to an OPT, which comes before all others, is not yet received."""
        self._parts: dict[str, nn.Module] = {f"block {index}": block for index, block in enumerate(first.blocks)}

    @property
    @abstractmethod
    def _needs_backward(self) -> bool:
        """Return whether a micro-batch takes a second round trip, with gradients."""

    @abstractmethod
    def fit(self, batches: Sequence[Batch]) -> None:
        """Have the cloud fit its bottleneck, if any, to batches; called before the first step.

        Raises:
            LinkError: the cloud is gone or refuses.
        """

    @abstractmethod
    def predict(self, batch: Batch) -> Tensor:
        """Outputs of the task's head for a batch, without dropout."""

    @abstractmethod
    def traffic(
        self, step: int, micros: Sequence[Sequence[int]], trainable: TrainableParts | None = None
    ) -> Counter[str]:
        """Bytes of a step by kind of message, computed from the token counts of its texts alone.

        Args:
            step: number of the step.
            micros: for each micro-batch the token counts of its texts.
            trainable: trained parts, if they differ from this trainer's.
        """

    @abstractmethod
    def _request(self, micro: PendingMicroBatch, targets: int) -> Frame:
        """Request of a micro-batch, of a step with ``targets`` targets."""

    @abstractmethod
    def _on_reply(self, micro: PendingMicroBatch, answer: Frame, sums: LossSums) -> bool:
        """Process the reply; return whether a gradient was sent, whose reply goes to :meth:`_end`."""

    def _may_send(self, in_flight: Sequence[PendingMicroBatch]) -> bool:
        """Return whether one more micro-batch may be sent.

        However many are in flight, the BWD of the last micro-batch must stay the step's last one, as the cloud then
        reports the norm of its gradients.
        """
        max_in_forward = (self._max_in_flight + 1) // 2 if self._needs_backward else self._max_in_flight
        return (
            len(in_flight) < self._max_in_flight and sum(not micro.in_backward for micro in in_flight) < max_in_forward
        )

    def step(self, batches: Sequence[Batch]) -> Step:
        """Run one optimiser step of both sides over micro-batches.

        Raises:
            TrainingError: the gradients were not finite too many times in a row, or no target is labelled.
            LinkError: the cloud is gone or refuses.
        """
        sums = self.trainer.begin(batches)
        todo = deque(enumerate(batches))
        in_flight: deque[PendingMicroBatch] = deque()
        self._cloud_norm, self._non_finite = 0.0, False
        while todo or in_flight:
            while todo and self._may_send(in_flight):
                number, batch = todo.popleft()
                in_flight.append(self._begin(number, batch, not todo, sums.tokens))
            micro = in_flight.popleft()
            answer = self._receive()
            if micro.in_backward:
                self._end(micro, parse_body(answer, BackwardReply), answer.raw)
            elif self._on_reply(micro, answer, sums):
                micro.in_backward = True
                in_flight.append(micro)
        norm = math.inf if self._non_finite else math.hypot(self.trainer.gradient_norm(), self._cloud_norm)
        if self.trainable.cloud:
            request = OptimiseRequest(step=self.trainer.step_index, norm=norm if math.isfinite(norm) else math.inf)
            self.cloud.send(Frame.of(TuneKind.OPT, request))
            self._optimise_pending = True
        with self._timed():
            return self.trainer.finish(sums, norm)

    def wait_for_optimiser(self) -> None:
        """Wait for the cloud's reply to the latest OPT; the next step's requests need not wait for it."""
        if self._optimise_pending:
            self._optimise_pending = False
            reply = parse_body(self._receive(), OptimiseReply)
            self.clock.cloud += reply.seconds
            self.ended = reply.ended

    def state(self) -> dict[str, Tensor]:
        """State of the edge's side on which the next step depends."""
        return {**state_of(self.modules, self.trainer), **self.activation_cache.state()}

    def trained_weights(self) -> dict[str, Tensor]:
        """Trained weights and bottleneck tensors, without the optimiser."""
        return state_of(self.modules, None)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a result of :meth:`state`.

        Raises:
            TrainingError: the state is of other parameters.
        """
        load_state(self.modules, self.trainer, state)
        self.activation_cache.load(state)
        self._optimise_pending = False

    def load_round(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Continue with step ``step`` from a group's averaged weights, with this side's own optimiser state.

        Raises:
            TrainingError: the weights are of other parameters.
        """
        load_weights(self.modules, weights)
        self.trainer.jump(step)

    def _begin(self, number: int, batch: Batch, last: bool, targets: int) -> PendingMicroBatch:
        with self._timed(), torch.set_grad_enabled(self.trainable.first_part):
            micro = PendingMicroBatch(number, batch, last, self._bottleneck_input(batch, number, training=True))
            request = self._request(micro, targets)
        self.cloud.send(request)
        return micro

    def _end(self, micro: PendingMicroBatch, reply: BackwardReply, raw: bytes) -> None:
        """Backpropagate through the first part, if it is trained, and record the norm of the cloud's gradients."""
        self.clock.cloud += reply.seconds
        if self.trainable.first_part:
            with self._timed():
                try:
                    coded = EncodedTensor(reply.scale, raw)
                    gradient = self.wire_formats.uplink.unpack(coded, len(micro.numbers), stochastic=True)
                except ValueError as error:
                    raise invalid_reply_error(error) from None
                micro.numbers.backward(gradient.to(micro.numbers))
        self._cloud_norm = max(self._cloud_norm, reply.norm)

    def _bottleneck_input(self, batch: Batch, number: int, *, training: bool) -> Tensor:
        """Codes (n, width) of the valid tokens at the first cut."""
        with self._mode(number, training):
            hidden = self.first.hidden(batch.ids, valid=valid_or_none(batch), types=batch.types)
            return self.encoder(hidden[batch.valid])

    def _encode(self, numbers: Tensor, batch: Batch, *, training: bool) -> tuple[EncodedTensor, bytes]:
        """Encode a batch's codes; return them and, if deltas are sent, the bytes that identify its texts, else none."""
        sample_indices = self._sample_indices(batch) if training else []
        which = self.activation_cache.announce_visits(sample_indices)
        try:
            return self.activation_cache.pack("first", numbers, sample_indices, token_counts(batch)), which
        except ValueError as error:
            raise divergence_error(self.trainer.step_index, error) from None

    def _sample_indices(self, batch: Batch) -> Sequence[int]:
        """Indices of a batch's texts in the data set, if deltas are sent; otherwise empty."""
        if not self.activation_cache.kept:
            return []
        if batch.sample_indices is None:
            raise ValueError("activation deltas are sent, and the batch has no sample indices")
        return batch.sample_indices

    def _generator(self, number: int, cut: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.config.seed, self.trainer.step_index, number, cut))

    def _receive(self) -> Frame:
        self.wait_for_optimiser()
        started = time.perf_counter()
        try:
            return self.cloud.receive()
        finally:
            self.clock.waiting += time.perf_counter() - started

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.clock.edge += time.perf_counter() - started

    @contextmanager
    def _mode(self, number: int, training: bool) -> Iterator[None]:
        """Switch dropout on or off, with masks that are a function of the micro-batch."""
        for module in self.modules.values():
            module.train(training)
        with seeded(self._parts, self.config.seed, self.trainer.step_index, number) if training else nullcontext():
            yield


def invalid_reply_error(error: ValueError) -> LinkError:
    """Error for numbers from the cloud that do not match the agreement."""
    return LinkError(f"the cloud's numbers cannot be used: {error}")


def token_counts(batch: Batch) -> list[int]:
    """Number of tokens of each text."""
    lengths: list[int] = batch.valid.sum(dim=1).tolist()
    return lengths


def valid_or_none(batch: Batch) -> Tensor | None:
    """Mask of the tokens that are not padding; None if there is no padding."""
    return None if bool(batch.valid.all()) else batch.valid
