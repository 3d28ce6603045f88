"""A service of a few lines on a host of sessions: it adds what it is told, and refuses in every way there is."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from raycloud.link.channel import Connection, Loopback
from raycloud.link.frames import Body, Frame, Granted, Kind, body
from raycloud.link.hosting import Refused, Session, SessionHost, SessionLimits, TooBusy


class Number(Body):
    value: int


class Begun(Granted):
    start: int


class Adder(SessionHost[Session]):
    """Refuses 13 once it was accepted and fails with 99, is busy at 0, slow at 50, and takes nothing below -9."""

    kinds = frozenset({Kind.STEP})

    def __init__(self, limits: SessionLimits) -> None:
        self.sums, self.counts = Counter[bytes](), Counter[str]()
        super().__init__(limits, self)
        self.loopback = Loopback(self._serve)

    async def _serve(self, connection: Connection) -> None:
        await self.serve(connection, "me")

    def count(self, name: str, value: float = 1) -> None:
        self.counts[name] += int(value)

    def level(self, name: str, value: float) -> None:
        self.counts[name] = int(value)

    def opening(self, frame: Frame, principal: str) -> Callable[[], Session]:
        start = body(frame, Number).value
        if start < 0:
            raise Refused("start", "a sum begins at 0 or more")

        def make() -> Session:
            self.sums[frame.session] = start
            return Session(id=frame.session, principal=principal, epoch=frame.epoch, limits=self._limits)

        return make

    def granted(self, session: Session) -> Begun:
        return Begun(lease_s=self._limits.lease_s, credit=self._limits.credit, start=self.sums[session.id])

    def begin(self, session: Session, frame: Frame) -> Awaitable[Frame]:
        value = body(frame, Number).value
        if value == 0:
            raise TooBusy(0.25)
        if value < -9:
            raise Refused("large", "too much to take away")
        return self._added(session, value)

    async def _added(self, session: Session, value: int) -> Frame:
        await asyncio.sleep(3.0 if value == 50 else 0)
        if value == 13:
            raise Refused("unlucky", "13 is not added")
        if value == 99:
            raise RuntimeError("a secret")
        self.sums[session.id] += value
        return Frame(Kind.STEP_OK, payload=Number(value=self.sums[session.id]).pack())

    def freed(self, session: Session) -> None:
        del self.sums[session.id]

    def forget(self) -> None:
        """Lose all sessions at once, as a replica that is replaced does."""

        async def forget() -> None:
            for session in self.held():
                self._free(session)

        asyncio.run_coroutine_threadsafe(forget(), self.loopback.loop).result(20)
