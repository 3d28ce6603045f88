"""Minimal service for the session server: it adds numbers, and refuses in every possible way."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from enum import IntEnum

from raycloud.link.channel import Connection, Loopback
from raycloud.link.frames import Body, Frame, OpenRequest, SessionGrant, parse_body
from raycloud.link.server import RequestRefused, ServerBusy, Session, SessionLimits, SessionServer


class AdderKind(IntEnum):
    ADD = 16
    ADD_OK = 17
    ECHO = 18
    ECHO_OK = 19


class Start(OpenRequest):
    service: str = "adder"
    value: int = 0


class Number(Body):
    value: int


class Begun(SessionGrant):
    start: int


class Adder(SessionServer[Session]):
    """Refuse 13 once it was accepted, fail with 99, be busy at 0, wait at 50 until released, and refuse values
    below -9. It also returns the raw bytes of an ECHO, reversed."""

    service, kinds, requests = "adder", AdderKind, frozenset({AdderKind.ADD, AdderKind.ECHO})

    def __init__(self, limits: SessionLimits) -> None:
        self.sums, self.counts = Counter[bytes](), Counter[str]()
        self.go_on = threading.Event()
        super().__init__(limits, self)
        self.loopback = Loopback(self._serve)

    async def _serve(self, connection: Connection) -> None:
        await self.serve(connection, "me")

    def count(self, name: str, value: float = 1) -> None:
        self.counts[name] += int(value)

    def level(self, name: str, value: float) -> None:
        self.counts[name] = int(value)

    def opening(self, frame: Frame, principal: str) -> Callable[[], Session]:
        start = parse_body(frame, Start).value
        if start < 0:
            raise RequestRefused("start", "a sum begins at 0 or more")

        def make() -> Session:
            self.sums[frame.session] = start
            return Session(id=frame.session, principal=principal, epoch=frame.epoch, limits=self._limits)

        return make

    def granted(self, session: Session) -> Begun:
        return Begun(lease_s=self._limits.lease_s, credit=self._limits.credit, start=self.sums[session.id])

    def begin(self, session: Session, frame: Frame) -> Awaitable[Frame]:
        self.counts["computed"] += 1
        if frame.kind is AdderKind.ECHO:
            return self._reversed(frame.raw)
        value = parse_body(frame, Number).value
        if value == 0:
            raise ServerBusy(0.25)
        if value < -9:
            raise RequestRefused("large", "too much to take away")
        return self._added(session, value)

    async def _added(self, session: Session, value: int) -> Frame:
        await asyncio.sleep(0)
        while value == 50 and not self.go_on.is_set():
            await asyncio.sleep(0.005)
        if value == 13:
            raise RequestRefused("unlucky", "13 is not added")
        if value == 99:
            raise RuntimeError("a secret")
        self.sums[session.id] += value
        return Frame.of(AdderKind.ADD_OK, Number(value=self.sums[session.id]))

    async def _reversed(self, raw: bytes) -> Frame:
        return Frame(AdderKind.ECHO_OK, raw=raw[::-1])

    def freed(self, session: Session) -> None:
        del self.sums[session.id]

    def forget(self) -> None:
        """Lose all sessions at once, as a replaced replica does."""

        async def forget() -> None:
            for session in self.held():
                self._free(session)

        asyncio.run_coroutine_threadsafe(forget(), self.loopback.loop).result(120)
