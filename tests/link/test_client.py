"""Session client with a minimal service: it reconnects, and gives up after its patience."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum

import pytest

from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.client import SessionClient, SessionLost, _IdleTimeout
from raycloud.link.frames import BusyReply, ErrorReply, Frame, FrameError, SessionKind, parse_body, unpack
from raycloud.link.server import SessionLimits
from tests.clock import Clock
from tests.link.adder import Adder, AdderKind, Begun, Number, Start


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.link.client._FIRST_WAIT_S", 0.005)
    monkeypatch.setattr("raycloud.link.client._FAREWELL_S", 0.1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Fake clock by which patience is measured."""
    made = Clock()
    monkeypatch.setattr("raycloud.link.client.time", made)
    return made


@pytest.fixture
def host() -> Iterator[Adder]:
    made = Adder(SessionLimits(credit=3))
    yield made
    made.loopback.close()


class Edge:
    """Client of the adder that sends all numbers again if the cloud lost its sum; each request says whether it does."""

    def __init__(
        self, host: Adder, *, wrap: Callable[[Channel], Channel] = lambda channel: channel, patience_s: float = 20.0
    ) -> None:
        self._said: list[int] = []
        self.caller: SessionClient[tuple[int, bool], Begun] = SessionClient(
            lambda session: wrap(host.loopback.connect()),
            AdderKind,
            Start(),
            Begun,
            lambda request: Frame.of(AdderKind.ADD, Number(value=request[0])),
            self._anew,
            patience_s,
        )

    def _anew(self, unanswered: list[tuple[int, bool]]) -> list[tuple[int, bool]]:
        return [(value, True) for value in self._said] + [request for request in unanswered if not request[1]]

    def add(self, *values: int) -> list[int]:
        """Return the sums after each of some values."""
        self.caller.send([(value, False) for value in values])
        sums: list[int] = []
        while len(sums) < len(values):
            (value, again), reply = self.caller.receive()
            if not again:
                self._said.append(value)
                sums.append(parse_body(reply, Number).value)
        return sums


class Cut:
    """Channels that break at one event, before or after a message in either direction, counted over all channels."""

    def __init__(self, at: int, lose: Callable[[], None]) -> None:
        self.at, self._lose, self.events = at, lose, itertools.count()

    def __call__(self, inner: Channel) -> Channel:
        return _Cut(inner, self)

    def pass_by(self, inner: Channel) -> None:
        if next(self.events) == self.at:
            self._lose()
            inner.close()
            raise LinkDown("cut")


class _Cut:
    def __init__(self, inner: Channel, cut: Cut) -> None:
        self._inner, self._cut = inner, cut

    def send(self, data: bytes) -> None:
        self._cut.pass_by(self._inner)
        self._inner.send(data)
        self._cut.pass_by(self._inner)

    def receive(self, timeout_s: float) -> bytes:
        data = self._inner.receive(timeout_s)
        self._cut.pass_by(self._inner)
        return data

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("loses", [False, True], ids=["cut", "cut-and-lost"])
def test_a_cut_at_any_moment_changes_no_sum(loses: bool, host: Adder) -> None:
    for event in range(20):
        cut = Cut(event, host.forget if loses else lambda: None)
        edge = Edge(host, wrap=cut)
        assert edge.add(1, 2, 3, 4, 5) == [1, 3, 6, 10, 15], event
        assert edge.add(6, 7) == [21, 28], event
        assert next(cut.events) > event, event
        edge.caller.close()
        host.forget()


def test_closing_ends_the_session_at_both_ends(host: Adder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.link.client._FAREWELL_S", 60.0)
    edge = Edge(host)
    assert (edge.caller.granted.credit, edge.caller.granted.start) == (3, 0)
    assert edge.add(7) == [7]
    assert list(host.sums) == [edge.caller.session]
    edge.caller.close()
    edge.caller.close()
    assert host.sessions == 0


@pytest.mark.waits
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-10, "the cloud refused a request: too much to take away"),
        (13, "the cloud refused a request: 13 is not added"),
        (99, "the cloud refused a request: the add failed: RuntimeError"),
        (0, r"no answer from the cloud within 60 s: it is busy"),
    ],
)
def test_what_cannot_be_mended_is_one_line(value: int, said: str, host: Adder, clock: Clock) -> None:
    edge = Edge(host, patience_s=60)
    with pytest.raises(LinkError, match=f"^{said}$"):
        edge.add(1, value)
    edge.caller.close()


def test_a_service_may_be_unable_to_begin_anew(host: Adder) -> None:
    edge = Edge(host)
    edge.add(1, 2)
    edge.caller._anew = None
    host.forget()
    with pytest.raises(SessionLost, match="the cloud lost the session; it keeps that of a silent edge 60 s"):
        edge.add(3)
    assert host.sessions == 0, "a session was begun that could not go on"


def test_connecting_goes_on_until_it_works(host: Adder, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = iter([LinkDown("nobody"), TimeoutError(), FrameError("garbage")])

    def wrap(inner: Channel) -> Channel:
        for error in outcomes:
            raise error
        return inner

    with caplog.at_level("INFO", "raycloud.link.client"):
        assert Edge(host, wrap=wrap).add(1) == [1]
    whys = ["nobody", "no reply in time", "garbage"]
    assert [record.getMessage() for record in caplog.records] == [f"reconnecting: {why}" for why in whys]


@pytest.mark.waits
def test_connecting_ends_with_patience_or_an_error_that_stays(host: Adder, clock: Clock) -> None:
    def refused(inner: Channel) -> Channel:
        raise LinkError("refused the token")

    def nobody(inner: Channel) -> Channel:
        raise LinkDown("nobody")

    with pytest.raises(LinkError, match=r"^refused the token$"):
        Edge(host, wrap=refused)
    assert clock.now == 0
    with pytest.raises(LinkError, match=r"^no answer from the cloud within 20 s: nobody$"):
        Edge(host, wrap=nobody)
    assert 15 < clock.now <= 20


@pytest.mark.waits
def test_a_connection_that_always_breaks_is_given_up_after_ever_longer_pauses(host: Adder, clock: Clock) -> None:
    connections = list[float]()

    def wrap(inner: Channel) -> Channel:
        connections.append(clock.now)
        cut = Cut(3, lambda: None)  # after OPEN or RESUME and its answer
        return cut(inner)

    edge = Edge(host, wrap=wrap)
    with pytest.raises(LinkError, match=r"^no answer from the cloud within 20 s: the channel is closed$"):
        edge.add(1)
    assert 10 < len(connections) < 40 and connections[-1] > 15


@pytest.mark.waits
def test_patience_is_that_of_waiting_for_a_reply(host: Adder, clock: Clock) -> None:
    edge = Edge(host, patience_s=10)
    edge.caller.send([(1, False)])
    clock.sleep(60)  # the edge does something else, and the connection breaks meanwhile
    assert edge.caller._channel is not None
    edge.caller._channel.close()
    assert parse_body(edge.caller.receive()[1], Number).value == 1


def test_patience_is_renewed_by_what_comes_back(clock: Clock) -> None:
    patience = _IdleTimeout("the cloud", 10)
    clock.sleep(12)
    assert patience.left == 0
    with pytest.raises(LinkError, match=r"^no answer from the cloud within 10 s: busy$"):
        patience.pause(0, "busy")
    patience.renew()
    assert patience.left == 10
    patience.pause(1, "busy")
    assert 9 <= patience.left <= 9.5


class Answering:
    """Channel that answers everything with one frame."""

    def __init__(self, reply: Frame) -> None:
        self._reply = reply.pack()

    def send(self, data: bytes) -> None:
        pass

    def receive(self, timeout_s: float) -> bytes:
        return self._reply

    def close(self) -> None:
        pass


@pytest.mark.waits
def test_only_what_may_pass_is_tried_again(host: Adder, clock: Clock) -> None:
    def error(code: str) -> Frame:
        return Frame.of(SessionKind.ERROR, ErrorReply(code=code, message=f"because of {code}"))

    busy = Frame.of(SessionKind.BUSY, BusyReply(retry_after_s=99))
    for reply, passes, said in (
        (busy, True, "the cloud has as many edges as it takes"),
        (Frame(SessionKind.GOAWAY), True, "the cloud leaves"),
        (error("frame"), True, "because of frame"),
        (error("plan"), False, "the cloud refused the session: because of plan"),
        (Frame(SessionKind.PING), False, "the cloud answered PING where it should have opened a session"),
    ):
        tries = list[Channel]()

        def wrap(inner: Channel, reply: Frame = reply, tries: list[Channel] = tries) -> Channel:
            tries.append(inner)
            return Answering(reply)

        with pytest.raises(LinkError, match=f"{said}$"):
            Edge(host, wrap=wrap)
        assert (len(tries) > 1) is passes


@pytest.mark.waits
def test_a_request_to_a_busy_cloud_is_repeated_after_two_seconds_at_most(host: Adder, clock: Clock) -> None:
    edge = Edge(host)
    edge.caller.send([(50, False)])
    edge.caller._heed(Frame(SessionKind.BUSY, seq=1, body=BusyReply(retry_after_s=99).pack()))
    assert 1 <= clock.now <= 2
    host.go_on.set()
    assert parse_body(edge.caller.receive()[1], Number).value == 50


class Timed:
    """Channel whose waits advance a fake clock: by the timeout, and by some time per frame."""

    def __init__(self, inner: Channel, clock: Clock, seconds: float) -> None:
        self._inner, self._clock, self._seconds = inner, clock, seconds
        self.send, self.close = inner.send, inner.close
        self.heard: list[IntEnum] = []

    def receive(self, timeout_s: float) -> bytes:
        try:
            data = self._inner.receive(min(timeout_s, 60.0))
        except TimeoutError:
            self._clock.sleep(timeout_s)
            raise
        self._clock.sleep(self._seconds)
        self.heard.append(unpack(data, AdderKind).kind)
        return data


@pytest.mark.waits
def test_a_reply_may_take_longer_than_patience_while_others_are_answered(clock: Clock) -> None:
    host, channels = Adder(SessionLimits()), list[Timed]()
    host.heartbeat_s = 0.02

    def timed(inner: Channel) -> Channel:
        channels.append(Timed(inner, clock, seconds=50))
        return channels[-1]

    try:
        edge, other = Edge(host, wrap=timed, patience_s=120), Edge(host)
        edge.caller.send([(50, False)])
        asked = clock.now
        # Each answer to the other one is told of; three of them take longer than patience.
        while channels[-1].heard.count(SessionKind.PING) < 3:
            other.add(1)
            edge.caller._heed(edge.caller._get())
        host.go_on.set()
        assert parse_body(edge.caller.receive()[1], Number).value == 50
        assert len(channels) == 1 and clock.now - asked > 120
    finally:
        host.go_on.set()
        host.loopback.close()


@pytest.mark.waits
def test_a_reply_is_not_waited_for_longer_than_patience_where_nobody_is_answered(clock: Clock) -> None:
    host = Adder(SessionLimits())
    host.heartbeat_s = 0.02
    try:
        edge = Edge(host, wrap=lambda inner: Timed(inner, clock, seconds=0), patience_s=120)
        edge.caller._patience.seconds = 1.2  # once it is connected, which may take longer
        with pytest.raises(LinkError, match=r"no answer from the cloud within 1\.2 s"):
            edge.add(50)
    finally:
        host.go_on.set()
        host.loopback.close()


@pytest.mark.waits
def test_only_the_answers_to_others_are_told_of() -> None:
    """An edge gets no heartbeats for its own pending request: they would hide that nothing progresses."""
    host, heard = Adder(SessionLimits()), []
    host.heartbeat_s = 0.02

    def go_on_later() -> None:
        threading.Timer(0.3, host.go_on.set).start()  # many beats later

    class Heard:
        def __init__(self, inner: Channel) -> None:
            self._inner, self.send, self.close = inner, inner.send, inner.close

        def receive(self, timeout_s: float) -> bytes:
            data = self._inner.receive(timeout_s)
            heard.append(unpack(data, AdderKind).kind)
            if heard[-1] is SessionKind.PING:
                go_on_later()
            return data

    try:
        edge = Edge(host, wrap=Heard, patience_s=120)
        assert edge.add(1, 2) == [1, 3]
        go_on_later()
        assert edge.add(50) == [53]
        assert SessionKind.PING not in heard
        host.go_on.clear()
        edge.caller.send([(50, False)])
        Edge(host).add(1)  # while the answer is awaited
        assert parse_body(edge.caller.receive()[1], Number).value == 103
        assert 1 <= heard.count(SessionKind.PING) <= 2  # the other one was answered twice: OPEN and its number
    finally:
        host.go_on.set()
        host.loopback.close()
