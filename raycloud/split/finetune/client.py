"""Client of a cloud at the other end of a link: a session that outlives broken connections, with checkpoints."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from raycloud.link.channel import Channel
from raycloud.link.client import SessionClient
from raycloud.link.frames import Frame, SessionGrant
from raycloud.split.finetune.bottleneck import decoder_to_bytes
from raycloud.split.finetune.messages import OpenTuning, SaveRequest, TuneKind


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
        self._client: SessionClient[Frame, SessionGrant] = SessionClient(
            connect, TuneKind, opening, SessionGrant, lambda request: request, None, patience_s
        )
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
