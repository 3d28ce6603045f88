"""The edge's end of a link: patience with a peer that is slow or gone, and sessions that outlive broken connections."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from typing import Generic, TypeVar

from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import Body, Busy, Frame, FrameError, Granted, Kind, Refusal, Resumed, body, unpack

log = logging.getLogger(__name__)

# Refusals that a repetition mends, and those that only a new session does; all others are errors.
_REPEAT, _LOST = ("gap",), ("unknown-session", "gone", "expired")
_FIRST_WAIT_S, _LONGEST_WAIT_S, _FAREWELL_S = 0.05, 2.0, 1.0

R = TypeVar("R")
G = TypeVar("G", bound=Granted)


class Patience:
    """How long nothing may come back, reconnecting included.

    Args:
        peer: who is waited for, such as ``the cloud``.
        seconds: for how long.
    """

    def __init__(self, peer: str, seconds: float) -> None:
        self.peer, self.seconds = peer, seconds
        self.renew()

    def renew(self) -> None:
        """Something came back, or is only now asked for."""
        self._since = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds; 0 once it has run out."""
        return max(0.0, self._since + self.seconds - time.monotonic())

    def over(self, why: str = "") -> LinkError:
        """What to raise when it has run out."""
        return LinkError(f"no answer from {self.peer} within {self.seconds:g} s" + (f": {why}" if why else ""))

    def pause(self, seconds: float, why: str) -> None:
        """Wait a little, with jitter so that many edges do not come back at once.

        Raises:
            LinkError: it would run out.
        """
        if self.left <= seconds:
            raise self.over(why)
        time.sleep(seconds * random.uniform(0.5, 1.0))


def reconnect(patience: Patience, attempt: Callable[[str], None], cause: Exception | None = None) -> None:
    """Attempt to connect until it works, with pauses that grow.

    Args:
        patience: for how long.
        attempt: connects and says what must be said first; told why it has to, empty for the first connection.
            LinkDown, FrameError and TimeoutError mean that another attempt may work.
        cause: what ended the last connection.

    Raises:
        LinkError: patience has run out, or the attempt raises any other.
    """
    wait, why = 0.0, ""
    while True:
        if cause is not None:
            why = str(cause) or "no reply in time"
            log.info("reconnecting: %s", why)
            patience.pause(wait, why)
            wait = min(max(_FIRST_WAIT_S, 2 * wait), _LONGEST_WAIT_S)
        try:
            attempt(why)
            return
        except (LinkDown, FrameError, TimeoutError) as error:
            cause = error


def asked_to_wait(busy: Frame) -> float:
    """Seconds after which a peer that is busy may be asked again, within reason.

    Raises:
        FrameError: the frame does not say.
    """
    return min(body(busy, Busy).retry_after_s, _LONGEST_WAIT_S)


def refused(reply: Frame, peer: str) -> LinkError:
    """Why a peer did not open what it was asked to; LinkDown where another attempt may work."""
    if reply.kind is Kind.BUSY:
        return LinkDown(f"{peer} has as many edges as it takes")
    if reply.kind is Kind.GOAWAY:
        return LinkDown(f"{peer} leaves")
    if reply.kind is not Kind.ERROR:
        return LinkError(f"{peer} answered {reply.kind.name} where it should have opened a session")
    refusal = body(reply, Refusal)
    if refusal.code == "frame":
        return LinkDown(refusal.message)
    return LinkError(f"{peer} refused the session: {refusal.message}")


class SessionLost(LinkError):
    """The cloud no longer has the session, and a new one could not take its place."""


class Caller(Generic[R, G]):
    """A session of requests in order, each answered exactly once however often the channel breaks.

    It resumes the session with every new connection. Where the cloud lost it, a new one begins if the service can say
    what it must be asked then. For one thread.

    Args:
        connect: opens a channel; called again whenever one breaks. It is given the session's id, by which a router can
            keep a session at one replica.
        opening: what OPEN asks for.
        grants: what OPEN_OK says.
        frame: makes the frame of a request whenever it is sent; session, epoch, seq and ack are added.
        anew: what a new session is asked in place of what was unanswered in the lost one; None where a new one cannot
            go on from there, so that none is begun.
        replies: kinds of frames that answer a request.
        patience_s: how long nothing may come back, reconnecting included. A cloud where requests wait behind those of
            others sends PING while it answers these, which is something.

    Raises:
        LinkError: the cloud cannot be reached in time, or refuses.
    """

    granted: G
    """What the cloud granted when the session was opened."""

    def __init__(
        self,
        connect: Callable[[str], Channel],
        opening: Body,
        grants: type[G],
        frame: Callable[[R], Frame],
        anew: Callable[[list[R]], list[R]] | None,
        replies: Collection[Kind],
        patience_s: float,
    ) -> None:
        self._connect, self._opening, self._grants = connect, opening, grants
        self._frame, self._anew, self._replies = frame, anew, replies
        self._patience = Patience("the cloud", patience_s)
        self._channel: Channel | None = None
        self._away: deque[tuple[int, R]] = deque()
        # How many of them, from the oldest on, are sent and not refused.
        self._transmitted = 0
        self.session = bytes(16)
        """Its id, which changes when one begins anew."""
        self._epoch = self._seq = self._ack = 0
        # Whether the cloud said that it has the session, and that it had one ever.
        self._begun = self._once = False
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    def send(self, requests: list[R]) -> None:
        """Send requests off as far as the cloud's credit goes, and the others as replies come in."""
        if not self._away:
            self._patience.renew()
        self._enqueue(requests)
        self._transmit()

    def receive(self) -> tuple[R, Frame]:
        """The oldest request that is not yet answered, and its reply.

        Raises:
            SessionLost: the cloud lost the session, and there is no ``anew``.
            LinkError: the link cannot be mended, or the cloud refuses.
        """
        frame = self._reply()
        seq, request = self._away.popleft()
        self._transmitted -= 1
        self._ack = seq
        self._patience.renew()
        self._transmit()
        return request, frame

    def close(self) -> None:
        """End the session, so that the cloud need not wait for its lease."""
        if self._channel is not None:
            with suppress(LinkError, TimeoutError):
                self._put(Frame(Kind.CLOSE, self.session, self._epoch))
                # The cloud hangs up after its answer: an answer to a closed socket is an error in the proxy's log.
                while self._begun:
                    self._channel.receive(_FAREWELL_S)
            self._hang_up()

    # -- requests

    def _enqueue(self, requests: list[R]) -> None:
        for request in requests:
            self._seq += 1
            self._away.append((self._seq, request))

    def _transmit(self, most: int | None = None) -> None:
        """Send what credit allows; a broken channel is mended by :meth:`_reply`, which is called next."""
        try:
            while self._transmitted < min(len(self._away), most or self.granted.credit):
                seq, request = self._away[self._transmitted]
                self._transmitted += 1
                frame = self._frame(request)
                self._put(replace(frame, session=self.session, epoch=self._epoch, seq=seq, ack=self._ack))
        except LinkDown as error:
            log.info("sending failed: %s", error)

    def _reply(self) -> Frame:
        """The reply to the oldest request."""
        while True:
            try:
                frame = self._get()
                if frame.kind in self._replies and frame.seq == self._away[0][0]:
                    return frame
                self._heed(frame)
            except (LinkDown, FrameError, TimeoutError) as error:
                self._recover(error)

    def _heed(self, frame: Frame) -> None:
        """Act on a frame that is not the reply waited for.

        Raises:
            LinkDown: the connection or the session is over.
            LinkError: a request was refused for good.
        """
        if frame.kind is Kind.PING:
            self._patience.renew()
        elif frame.kind is Kind.BUSY:
            self._again(frame.seq, asked_to_wait(frame), "it is busy")
        elif frame.kind in (Kind.GOAWAY, Kind.CLOSE):
            raise LinkDown("the replica left")
        elif frame.kind is Kind.ERROR:
            refusal = body(frame, Refusal)
            if refusal.code in _LOST:
                self.close()
                self._begun = False
                raise LinkDown(refusal.message)
            if refusal.code == "frame":
                raise LinkDown(refusal.message)
            if refusal.code not in _REPEAT:
                raise LinkError(f"the cloud refused a request: {refusal.message}")
            self._again(frame.seq, _FIRST_WAIT_S, refusal.message)
        # Anything else is the answer to a request that was repeated.

    def _again(self, seq: int, wait_s: float, why: str) -> None:
        """Send a request again that was not accepted, and those behind it once it is answered.

        They were not accepted either: sent along, each would be refused and repeated again, and ever more of them.
        """
        index = seq - self._away[0][0]
        if 0 <= index < self._transmitted:
            self._patience.pause(wait_s, why)
            self._transmitted = index
            self._transmit(index + 1)

    # -- connections

    def _recover(self, cause: Exception | None = None) -> None:
        """Connect, resume the session or begin it anew, and send again what was not answered."""
        reconnect(self._patience, self._attempt, cause)

    def _attempt(self, _: str) -> None:
        self._hang_up()
        if not self._begun:
            if self._once and self._anew is None:
                lease = self.granted.lease_s
                raise SessionLost(f"{self._patience.peer} lost the session; it keeps that of a silent edge {lease:g} s")
            self.session, self._epoch = secrets.token_bytes(16), 0
        self._channel = self._connect(self.session.hex())
        if self._begun:
            self._resume()
        else:
            self._open()
        self._transmitted = 0
        self._transmit()

    def _open(self) -> None:
        reply = self._ask(Frame(Kind.OPEN, self.session, payload=self._opening.pack()))
        if reply.kind is not Kind.OPEN_OK:
            raise refused(reply, self._patience.peer)
        self.granted, self._begun = body(reply, self._grants), True
        if self._once and self._anew is not None:
            unanswered = [request for _, request in self._away]
            self._away.clear()
            self._seq = self._ack = 0
            self._enqueue(self._anew(unanswered))
        self._once = True

    def _resume(self) -> None:
        self._epoch += 1
        reply = self._ask(Frame(Kind.RESUME, self.session, self._epoch, self._seq, self._ack))
        if reply.kind is Kind.RESUMED:
            body(reply, Resumed)
            return
        code = body(reply, Refusal).code if reply.kind is Kind.ERROR else ""
        if code == "epoch":
            raise LinkDown("another connection took the session over")
        if code != "unknown-session":
            raise refused(reply, self._patience.peer)
        # The next connection is made under the next session's id, by which a router will find it again.
        self._begun = False
        raise LinkDown("the cloud no longer has the session")

    def _ask(self, frame: Frame) -> Frame:
        self._put(frame)
        return self._get()

    def _put(self, frame: Frame) -> None:
        if self._channel is None:
            raise LinkDown("not connected")
        self._channel.send(frame.pack())

    def _get(self) -> Frame:
        """The next frame; a third of the patience leaves time to ask again elsewhere."""
        if self._channel is None:
            raise LinkDown("not connected")
        return unpack(self._channel.receive(self._patience.seconds / 3))

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
