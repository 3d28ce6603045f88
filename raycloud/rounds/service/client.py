"""Client of the rounds at a device."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass

from raycloud.errors import LinkError
from raycloud.link.channel import Channel
from raycloud.link.client import SessionClient
from raycloud.link.frames import Body, Frame, parse_body
from raycloud.link.meter import Meter
from raycloud.rounds.service.messages import (
    Blob,
    ContributionReply,
    ContributionRequest,
    HeartbeatReply,
    HeartbeatRequest,
    OpenRounds,
    PullReply,
    PullRequest,
    RoundGrant,
    RoundKind,
    TaskReply,
    TaskRequest,
)


@dataclass(frozen=True)
class _Request:
    kind: RoundKind
    body: Body
    raw: bytes = b""
    most: int = 0
    """Largest number of raw bytes of the reply."""


class RoundClient:
    """Device's end of the rounds of a job. Requests may be repeated, so that a new session replaces a lost one.

    Several threads may call it; their requests take turns.

    Args:
        connect: opens a channel; see :class:`~raycloud.link.client.SessionClient`.
        device: name of the device's edge in the job's recipe; None for the only one.
        patience_s: longest time in seconds without an answer, reconnecting included.
        meter: counts the frames in both directions and their bytes by the names of their kinds.

    Raises:
        LinkError: the cloud cannot be reached in time, or refuses the device.
    """

    def __init__(
        self,
        connect: Callable[[str], Channel],
        device: str | None = None,
        *,
        patience_s: float = 60.0,
        meter: Meter | None = None,
    ) -> None:
        self._turn = threading.Lock()
        self._session: SessionClient[_Request, RoundGrant] = SessionClient(
            connect,
            RoundKind,
            OpenRounds(device=device, process=secrets.token_hex(16)),
            RoundGrant,
            lambda request: Frame.of(request.kind, request.body, request.raw),
            lambda unanswered: unanswered,
            patience_s,
            meter=meter,
            most_bytes=lambda request: request.most,
        )

    @property
    def granted(self) -> RoundGrant:
        """Grant of the server, with the job's recipe."""
        return self._session.granted

    @property
    def meter(self) -> Meter:
        """Meter of the link."""
        return self._session.meter

    def task(self, samples: int) -> TaskReply:
        """Ask for the next task; the answer takes some seconds where there is none.

        Args:
            samples: number of the device's training samples.
        """
        return parse_body(self._ask(_Request(RoundKind.TASK, TaskRequest(samples=samples))), TaskReply)

    def pull(self, blob: Blob) -> bytes | None:
        """Get bytes from the cloud; None if it does not have them any longer.

        Raises:
            LinkError: the cloud sent other bytes.
        """
        reply = self._ask(_Request(RoundKind.PULL, PullRequest(digest=blob.digest), most=blob.nbytes))
        if not parse_body(reply, PullReply).found:
            return None
        if len(reply.raw) != blob.nbytes or hashlib.sha256(reply.raw).hexdigest() != blob.digest:
            raise LinkError("the cloud sent other bytes than it had announced")
        return reply.raw

    def push(self, number: int, weights: str, samples: int, report: bytes, tensors: bytes) -> ContributionReply:
        """Send a contribution to a round.

        Args:
            number: number of the round.
            weights: digest of the weights that the round began with.
            samples: number of samples or tokens that the weights were trained on.
            report: report of the training.
            tensors: trained weights as safetensors.
        """
        body = ContributionRequest(round=number, weights=weights, samples=samples, report_bytes=len(report))
        return parse_body(self._ask(_Request(RoundKind.PUSH, body, report + tensors)), ContributionReply)

    def give_up(self, number: int, weights: str, error: str) -> None:
        """Tell the cloud that there is no contribution to a round, and why."""
        body = ContributionRequest(round=number, weights=weights, samples=0, report_bytes=0, error=error[:500])
        self._ask(_Request(RoundKind.PUSH, body))

    def heartbeat(
        self, number: int, weights: str, step: int, loss: float, tokens_per_second: float, process: int
    ) -> bool:
        """Tell the progress of the training; return whether the round is still the current one."""
        body = HeartbeatRequest(
            round=number,
            weights=weights,
            step=step,
            loss=loss,
            tokens_per_second=tokens_per_second,
            process=process,
        )
        return parse_body(self._ask(_Request(RoundKind.HEARTBEAT, body)), HeartbeatReply).current

    def close(self) -> None:
        """End the session: the device leaves the job."""
        with self._turn:
            self._session.close()

    def _ask(self, request: _Request) -> Frame:
        with self._turn:
            self._session.send([request])
            # A request that failed before is still answered first.
            while (answered := self._session.receive())[0] is not request:
                pass
            return answered[1]
