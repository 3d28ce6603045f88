"""Clients of the cloud: in the same process, or at the other end of a link, in a session that outlives connections."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from torch import nn

from raycloud.errors import TrainingError
from raycloud.link.channel import Channel
from raycloud.link.client import SessionClient
from raycloud.link.frames import Frame
from raycloud.link.meter import Meter
from raycloud.split.finetune.bottleneck import decoder_to_bytes
from raycloud.split.finetune.checkpoints import CheckpointStore
from raycloud.split.finetune.cloud import CloudTrainer
from raycloud.split.finetune.messages import OpenTuning, SaveRequest, TuneGrant, TuneKind


class CloudClient(Protocol):
    """Client of the cloud. Replies come in the order of the requests."""

    def send(self, request: Frame) -> None:
        """Send a request of any kind of :class:`TuneKind` but SAVE, which :meth:`save` sends."""
        ...

    def receive(self) -> Frame:
        """Receive the reply to the oldest unanswered request."""
        ...

    def save(self, step: int) -> None:
        """Save the cloud's checkpoint of this step; it is saved when this returns."""
        ...

    def close(self) -> None:
        """End the session."""
        ...


class LocalCloudClient:
    """Cloud client for a cloud in the same process; it counts the bytes of messages by kind, headers included.

    Messages are not packed into frames, so messages larger than a frame are allowed.
    """

    def __init__(self, trainer: CloudTrainer, meter: Meter | None = None, kept: CheckpointStore | None = None) -> None:
        self.trainer, self.meter, self.kept = trainer, meter or Meter(), kept
        self._answers: deque[Frame] = deque()

    def send(self, request: Frame) -> None:
        """Compute the reply at once.

        Raises:
            TrainingError: the hidden states are no longer finite.
        """
        try:
            answer = self.trainer.answer(request)
        except ValueError as error:
            raise divergence_error(self.trainer.step, error) from None
        for frame in (request, answer):
            self.meter.add(frame.kind.name, frame.size)
        self._answers.append(answer)

    def receive(self) -> Frame:
        """Return the oldest reply."""
        return self._answers.popleft()

    def save(self, step: int) -> None:
        """Save the cloud's checkpoint of this step, if there is a store."""
        if self.kept is not None:
            self.kept.save(step, self.trainer.state())

    def close(self) -> None:
        """Do nothing: the state belongs to this object."""


class RemoteCloudClient:
    """Client of a cloud over a channel. Each request is answered once, however often the channel breaks.

    Args:
        connect: opens a channel; called again whenever one breaks, with the session's id.
        opening: OPEN message with the agreement of both sides.
        decoder: the cloud's end of the first cut's bottleneck, sent unless the cloud restores a checkpoint.
        patience_s: longest time in seconds without an answer, reconnecting included; it must exceed the time of any one
            request's computation.

    Raises:
        LinkError: the cloud cannot be reached in time, or refuses.
    """

    def __init__(
        self, connect: Callable[[str], Channel], opening: OpenTuning, decoder: nn.Module, patience_s: float = 60.0
    ) -> None:
        self._client: SessionClient[Frame, TuneGrant] = SessionClient(
            connect, TuneKind, opening, TuneGrant, lambda request: request, None, patience_s
        )
        self.granted = self._client.granted
        """Grant of the cloud."""
        self.meter = self._client.meter
        """Bytes of messages by kind, in both directions, headers included."""
        if opening.uplink.low_rank and opening.restore is None:
            self.send(Frame(TuneKind.CODE, raw=decoder_to_bytes(decoder)))
            self.receive()

    def send(self, request: Frame) -> None:
        """Send a request, or queue it until the cloud's credit allows it."""
        self._client.send([request])

    def receive(self) -> Frame:
        """Receive the reply to the oldest unanswered request.

        Raises:
            SessionLost: both sides must continue from their last common checkpoint.
            LinkError: reconnecting failed, or the cloud refuses.
        """
        return self._client.receive()[1]

    def save(self, step: int) -> None:
        """Save a checkpoint of this step at the cloud; returns when it is saved."""
        self.send(Frame.of(TuneKind.SAVE, SaveRequest(step=step)))
        self.receive()

    def close(self) -> None:
        """End the session."""
        self._client.close()


def divergence_error(step: int, error: ValueError) -> TrainingError:
    """Error for hidden states that are no longer finite, though all gradients were."""
    return TrainingError(f"step {step}: {error}; a smaller training.lr may help")
