"""Session client of the edge: idle timeout, reconnection, and sessions that outlive broken connections."""

from __future__ import annotations

import logging
import random
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import IntEnum
from typing import Generic, TypeVar

from raycloud.errors import LinkError, LinkSetupError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import (
    PIECE_BYTES,
    BusyReply,
    ErrorReply,
    Frame,
    FrameError,
    OpenRequest,
    ResumeReply,
    ResumeRequest,
    SessionGrant,
    SessionKind,
    parse_body,
    unpack,
)
from raycloud.link.meter import Meter
from raycloud.link.pieces import MessageTooLarge, PieceAssembler

log = logging.getLogger(__name__)

# Error codes solved by repeating the request, and those solved only by a new session; all others are errors.
_RETRY_CODES, _LOST_CODES = ("gap",), ("unknown-session", "gone", "expired")
_FIRST_WAIT_S, _LONGEST_WAIT_S, _FAREWELL_S = 0.05, 2.0, 1.0

R = TypeVar("R")
G = TypeVar("G", bound=SessionGrant)


class _IdleTimeout:
    """Timeout for the longest time without an answer from a peer, reconnecting included.

    Args:
        peer: name of the peer in messages, such as ``the cloud``.
        seconds: length of the timeout.
    """

    def __init__(self, peer: str, seconds: float) -> None:
        self.peer, self.seconds = peer, seconds
        self.renew()

    def renew(self) -> None:
        """Restart the timeout, after an answer or when the wait for one begins."""
        self._since, self._next_wait_s = time.monotonic(), 0.0

    @property
    def left(self) -> float:
        """Seconds left; 0 once the timeout has run out."""
        return max(0.0, self._since + self.seconds - time.monotonic())

    def pause(self, seconds: float, why: str) -> None:
        """Wait up to ``seconds``, with jitter so that many edges do not reconnect at once.

        Raises:
            LinkError: the timeout would run out during the wait.
        """
        if self.left <= seconds:
            raise LinkError(f"no answer from {self.peer} within {self.seconds:g} s: {why}")
        time.sleep(seconds * random.uniform(0.5, 1.0))

    def back_off(self, why: str) -> None:
        """Wait before the next connection: longer each time, until there is an answer.

        Raises:
            LinkError: the timeout would run out during the wait.
        """
        self.pause(self._next_wait_s, why)
        self._next_wait_s = min(max(_FIRST_WAIT_S, 2 * self._next_wait_s), _LONGEST_WAIT_S)


def _open_error(reply: Frame, peer: str) -> LinkError:
    """Error for a reply that does not open the session; LinkDown if another attempt may work."""
    if reply.kind is SessionKind.BUSY:
        return LinkDown(f"{peer} has as many edges as it takes")
    if reply.kind is SessionKind.GOAWAY:
        return LinkDown(f"{peer} leaves")
    if reply.kind is not SessionKind.ERROR:
        return LinkError(f"{peer} answered {reply.kind.name} where it should have opened a session")
    refusal = parse_body(reply, ErrorReply)
    if refusal.code == "frame":
        return LinkDown(refusal.message)
    return SessionRefused(f"{peer} refused the session: {refusal.message}", refusal.code)


class SessionRefused(LinkSetupError):
    """Error of a peer that refuses to open the session because of what the client requested.

    Args:
        message: reason of the refusal.
        code: error code of the refusal, such as ``checkpoint``.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class SessionLost(LinkError):
    """Error of a session that the cloud no longer has and that no new session can replace."""


class SessionClient(Generic[R, G]):
    """Session of requests in order, each answered exactly once however often the channel breaks.

    The client resumes the session with every new connection; large requests and replies continue where they broke off.
    If the cloud lost the session, the client begins a new one when ``anew`` can give its first requests. Not
    thread-safe.

    Args:
        connect: opens a channel; called again whenever one breaks. Its argument is the session's id, by which a router
            can keep a session at one replica.
        kinds: kinds of the service.
        opening: body of OPEN.
        grants: schema of the body of OPEN_OK.
        frame: makes the frame of a request whenever it is sent; session, epoch, seq and ack are added.
        anew: requests of a new session that replace the unanswered ones of the lost session; None if a new session
            cannot continue the lost one, so that none is begun.
        patience_s: longest time in seconds without an answer, reconnecting included. A cloud that answers the requests
            of other edges first sends PING meanwhile, which counts as an answer.
        peer: name of the peer in messages.
        meter: counts the frames in both directions and their bytes by the names of their kinds.
        most_bytes: returns the largest number of raw bytes of the reply to a request; None for no limit.

    Raises:
        LinkError: the cloud cannot be reached in time, or refuses.
    """

    granted: G
    """Grant of the cloud when the session was opened."""

    def __init__(
        self,
        connect: Callable[[str], Channel],
        kinds: type[IntEnum],
        opening: OpenRequest,
        grants: type[G],
        frame: Callable[[R], Frame],
        anew: Callable[[list[R]], list[R]] | None,
        patience_s: float,
        *,
        peer: str = "the cloud",
        meter: Meter | None = None,
        most_bytes: Callable[[R], int] | None = None,
    ) -> None:
        self._connect, self._kinds, self._opening, self._open_reply = connect, kinds, opening, grants
        self._frame, self._anew, self._most_bytes = frame, anew, most_bytes
        self._patience = _IdleTimeout(peer, patience_s)
        self.meter = meter if meter is not None else Meter()
        self._channel: Channel | None = None
        self._in_flight: deque[tuple[int, R]] = deque()
        # Number of unanswered requests, from the oldest on, that are sent and not refused.
        self._transmitted = 0
        self.session = bytes(16)
        """Id of the session; it changes when a new session begins."""
        self._epoch = self._seq = self._ack = 0
        # Whether the cloud has confirmed this session, and whether it has ever confirmed one.
        self._begun = self._opened_before = False
        self._incoming = PieceAssembler()
        # State of the cloud at the latest resumption: the requests it accepted, and what it has of the next one.
        self._accepted = ResumeReply(next_seq=1)
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def send(self, requests: list[R]) -> None:
        """Send as many requests as the cloud's credit allows, and the others as replies arrive."""
        self._enqueue(requests)
        self._transmit()

    def receive(self) -> tuple[R, Frame]:
        """Receive the reply to the oldest unanswered request; return the request and the reply.

        Raises:
            SessionLost: the cloud lost the session, and there is no ``anew``.
            LinkError: reconnecting failed, or the cloud refuses a request.
        """
        # Replies may have arrived while the edge did something else; that time was no wait for an answer.
        self._patience.renew()
        frame = self._reply()
        seq, request = self._in_flight.popleft()
        self._transmitted -= 1
        self._ack = seq
        self._patience.renew()
        self._transmit()
        return request, frame

    def close(self) -> None:
        """End the session, so that the cloud need not wait until its lease expires."""
        if self._channel is not None:
            with suppress(LinkError, TimeoutError):
                self._put(Frame(SessionKind.CLOSE, self.session, self._epoch))
                # Wait until the cloud closes the connection: an answer to a closed socket is an error in a proxy's log.
                while self._begun:
                    self._channel.receive(_FAREWELL_S)
            self._disconnect()

    # -- requests

    def _enqueue(self, requests: list[R]) -> None:
        for request in requests:
            self._seq += 1
            self._in_flight.append((self._seq, request))

    def _transmit(self, most: int | None = None) -> None:
        """Send as many requests as credit allows; :meth:`_reply`, called next, reconnects a broken channel."""
        try:
            while self._transmitted < min(len(self._in_flight), most or self.granted.credit):
                seq, request = self._in_flight[self._transmitted]
                self._transmitted += 1
                frame = replace(self._frame(request), session=self.session, epoch=self._epoch, seq=seq, ack=self._ack)
                self._put(*self._missing_part(frame))
        except LinkDown as error:
            log.info("sending failed: %s", error)

    def _missing_part(self, frame: Frame) -> tuple[Frame, int]:
        """Frame of a request without what the cloud has of it, and the number of raw bytes to leave out."""
        if frame.seq < self._accepted.next_seq:
            return replace(frame, body=b"", raw=b""), 0
        begin = self._accepted.received if frame.seq == self._accepted.next_seq else 0
        # A request that is refused later is sent from its beginning again.
        self._accepted = self._accepted.model_copy(update={"received": 0})
        return frame, begin if begin < len(frame.raw) else 0

    def _reply(self) -> Frame:
        """Wait for the reply to the oldest request; reconnect if the channel breaks."""
        while True:
            try:
                frame = self._get()
                seq, request = self._in_flight[0]
                if frame.seq == seq and not isinstance(frame.kind, SessionKind):
                    self._patience.renew()
                    if (whole := self._incoming.add(frame, self._most(request))) is not None:
                        return whole
                else:
                    self._heed(frame)
            except MessageTooLarge as error:
                raise LinkError(f"{self._patience.peer}'s answer is too large: {error}") from None
            except (LinkDown, FrameError, TimeoutError) as error:
                self._recover(error)

    def _most(self, request: R) -> int:
        return sys.maxsize if self._most_bytes is None else self._most_bytes(request)

    def _heed(self, frame: Frame) -> None:
        """Handle a frame that is not the expected reply.

        Raises:
            LinkDown: the connection or the session is over.
            LinkError: a request was refused for good.
        """
        if frame.kind is SessionKind.PING:
            self._patience.renew()
        elif frame.kind is SessionKind.BUSY:
            retry_after_s = parse_body(frame, BusyReply).retry_after_s
            self._again(frame.seq, min(retry_after_s, _LONGEST_WAIT_S), "it is busy")
        elif frame.kind in (SessionKind.GOAWAY, SessionKind.CLOSE):
            raise LinkDown("the replica left")
        elif frame.kind is SessionKind.ERROR:
            refusal = parse_body(frame, ErrorReply)
            if refusal.code in _LOST_CODES:
                self.close()
                self._begun = False
                raise LinkDown(refusal.message)
            if refusal.code == "frame":
                raise LinkDown(refusal.message)
            if refusal.code not in _RETRY_CODES:
                raise LinkError(f"{self._patience.peer} refused a request: {refusal.message}")
            self._again(frame.seq, _FIRST_WAIT_S, refusal.message)
        # Any other frame is a second answer to a repeated request.

    def _again(self, seq: int, wait_s: float, why: str) -> None:
        """Send a request again that was not accepted, and the later ones once it is answered.

        The later requests were not accepted either. If they were sent at once, each would be refused and repeated, and
        their number would grow.
        """
        index = seq - self._in_flight[0][0]
        if 0 <= index < self._transmitted:
            self._patience.pause(wait_s, why)
            self._transmitted = index
            self._transmit(index + 1)

    # -- connections

    def _recover(self, cause: Exception | None = None) -> None:
        """Connect, resume the session or begin a new one, and send the unanswered requests again."""
        while True:
            if cause is not None:
                why = str(cause) or "no reply in time"
                log.info("reconnecting: %s", why)
                self._patience.back_off(why)
            try:
                self._attempt()
                return
            except (LinkDown, FrameError, TimeoutError) as error:
                cause = error

    def _attempt(self) -> None:
        self._disconnect()
        if not self._begun:
            if self._opened_before and self._anew is None:
                lease = self.granted.lease_s
                raise SessionLost(f"{self._patience.peer} lost the session; it keeps that of a silent edge {lease:g} s")
            self.session, self._epoch = secrets.token_bytes(16), 0
            self._incoming, self._accepted = PieceAssembler(), ResumeReply(next_seq=1)
        self._channel = self._connect(self.session.hex())
        if self._begun:
            self._resume()
        else:
            self._open()
        self._transmitted = 0
        self._transmit()

    def _open(self) -> None:
        reply = self._ask(Frame(SessionKind.OPEN, self.session, body=self._opening.pack()))
        if reply.kind is not SessionKind.OPEN_OK:
            raise _open_error(reply, self._patience.peer)
        self.granted, self._begun = parse_body(reply, self._open_reply), True
        if self._opened_before and self._anew is not None:
            unanswered = [request for _, request in self._in_flight]
            self._in_flight.clear()
            self._seq = self._ack = 0
            self._enqueue(self._anew(unanswered))
        self._opened_before = True

    def _resume(self) -> None:
        self._epoch += 1
        received = self._incoming.received(self._ack + 1)
        body = ResumeRequest(received=received).pack()
        reply = self._ask(Frame(SessionKind.RESUME, self.session, self._epoch, self._seq, self._ack, body=body))
        if reply.kind is SessionKind.RESUMED:
            self._accepted = parse_body(reply, ResumeReply)
            return
        code = parse_body(reply, ErrorReply).code if reply.kind is SessionKind.ERROR else ""
        if code == "epoch":
            raise LinkDown("another connection took the session over")
        if code != "unknown-session":
            raise _open_error(reply, self._patience.peer)
        # The next connection uses the next session's id, by which a router finds its replica again.
        self._begun = False
        raise LinkDown("the cloud no longer has the session")

    def _ask(self, frame: Frame) -> Frame:
        self._put(frame)
        return self._get()

    def _put(self, frame: Frame, begin: int = 0) -> None:
        """Send a frame, in pieces if it is large, without its first ``begin`` raw bytes."""
        for data in frame.pieces(begin):
            if self._channel is None:
                raise LinkDown("not connected")
            self.meter.add(frame.kind.name, len(data))
            self._channel.send(data)
            if len(frame.raw) > PIECE_BYTES:
                self._patience.renew()

    def _get(self) -> Frame:
        """Receive the next frame; waits a third of the timeout, which leaves time to repeat the request elsewhere."""
        if self._channel is None:
            raise LinkDown("not connected")
        data = self._channel.receive(self._patience.seconds / 3)
        frame = unpack(data, self._kinds)
        self.meter.add(frame.kind.name, len(data))
        return frame

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
