"""The edge's end of a session, with a service of a few lines: what breaks is mended, and patience ends."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from raycloud.errors import LinkError
from raycloud.link.caller import Caller, Patience, SessionLost, asked_to_wait, reconnect, refused
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import Busy, Frame, FrameError, Kind, Refusal, body, unpack
from raycloud.link.hosting import SessionLimits
from tests.link.adder import Adder, Begun, Number


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycloud.link.caller._FIRST_WAIT_S", 0.005)
    monkeypatch.setattr("raycloud.link.caller._FAREWELL_S", 0.1)


@pytest.fixture
def host() -> Iterator[Adder]:
    made = Adder(SessionLimits(credit=3))
    yield made
    made.loopback.close()


class Edge:
    """Adds up numbers, and says all of them again where the cloud lost its sum; each request says whether it does."""

    def __init__(
        self, host: Adder, *, wrap: Callable[[Channel], Channel] = lambda channel: channel, patience_s: float = 20.0
    ) -> None:
        self._said: list[int] = []
        self.caller: Caller[tuple[int, bool], Begun] = Caller(
            lambda session: wrap(host.loopback.connect()),
            Number(value=0),
            Begun,
            lambda request: Frame(Kind.STEP, payload=Number(value=request[0]).pack()),
            self._anew,
            (Kind.STEP_OK,),
            patience_s,
        )

    def _anew(self, unanswered: list[tuple[int, bool]]) -> list[tuple[int, bool]]:
        return [(value, True) for value in self._said] + [request for request in unanswered if not request[1]]

    def add(self, *values: int) -> list[int]:
        """The sums after each of some values."""
        self.caller.send([(value, False) for value in values])
        sums: list[int] = []
        while len(sums) < len(values):
            (value, again), reply = self.caller.receive()
            if not again:
                self._said.append(value)
                sums.append(body(reply, Number).value)
        return sums


class Cut:
    """Channels that break at one event, before or after a message of either direction, counted over all of them."""

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


def test_closing_ends_the_session_at_both_ends(host: Adder) -> None:
    edge = Edge(host)
    assert (edge.caller.granted.credit, edge.caller.granted.start) == (3, 0)
    assert edge.add(7) == [7]
    assert list(host.sums) == [edge.caller.session]
    edge.caller.close()
    edge.caller.close()
    assert host.sessions == 0


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-10, "the cloud refused a request: too much to take away"),
        (13, "the cloud refused a request: 13 is not added"),
        (99, "the cloud refused a request: the step failed: RuntimeError"),
        (0, r"no answer from the cloud within 0\.6 s: it is busy"),
    ],
)
def test_what_cannot_be_mended_is_one_line(value: int, said: str, host: Adder) -> None:
    edge = Edge(host, patience_s=0.6)
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


def test_attempts_are_told_why_and_go_on_until_one_works() -> None:
    whys, outcomes = list[str](), iter([LinkDown("nobody"), TimeoutError(), FrameError("garbage")])

    def attempt(why: str) -> None:
        whys.append(why)
        for error in outcomes:
            raise error

    reconnect(Patience("the cloud", 5), attempt)
    assert whys == ["", "nobody", "no reply in time", "garbage"]


def test_attempts_end_with_patience_or_an_error_that_stays() -> None:
    def attempt(why: str) -> None:
        raise LinkError("refused the token") if why == "unwilling" else LinkDown("nobody")

    with pytest.raises(LinkError, match=r"^refused the token$"):
        reconnect(Patience("the cloud", 5), attempt, LinkDown("unwilling"))
    started = time.monotonic()
    with pytest.raises(LinkError, match=r"^no answer from the teacher within 0\.2 s: nobody$"):
        reconnect(Patience("the teacher", 0.2), attempt)
    assert time.monotonic() - started < 2


def test_patience_is_renewed_by_what_comes_back() -> None:
    patience = Patience("the cloud", 0.1)
    time.sleep(0.12)
    assert patience.left == 0
    with pytest.raises(LinkError, match=r"^no answer from the cloud within 0\.1 s: busy$"):
        patience.pause(0, "busy")
    patience.renew()
    assert 0 < patience.left <= 0.1
    patience.pause(0.01, "busy")
    assert str(patience.over()) == "no answer from the cloud within 0.1 s"


def test_only_what_may_pass_is_tried_again() -> None:
    def error(code: str) -> Frame:
        return Frame(Kind.ERROR, payload=Refusal(code=code, message=f"because of {code}").pack())

    busy = Frame(Kind.BUSY, payload=Busy(retry_after_s=99).pack())
    for reply, passes, said in (
        (busy, True, "the cloud has as many edges as it takes"),
        (Frame(Kind.GOAWAY), True, "the cloud leaves"),
        (error("frame"), True, "because of frame"),
        (error("plan"), False, "the cloud refused the session: because of plan"),
        (Frame(Kind.PING), False, "the cloud answered PING where it should have opened a session"),
    ):
        found = refused(reply, "the cloud")
        assert (isinstance(found, LinkDown), str(found)) == (passes, said)
    assert asked_to_wait(busy) == 2.0


@pytest.mark.parametrize("others", [True, False], ids=["others-are-answered", "nobody-is"])
def test_a_reply_may_take_longer_than_patience_while_others_are_answered(others: bool) -> None:
    host = Adder(SessionLimits())
    host.beat_s = 0.1
    over = threading.Event()

    def ask_on() -> None:
        other = Edge(host)
        while not over.wait(0.02):
            other.add(1)

    asking = threading.Thread(target=ask_on)
    try:
        edge = Edge(host, patience_s=1.2)
        if others:
            asking.start()
            assert edge.add(50) == [50]
        else:
            with pytest.raises(LinkError, match=r"no answer from the cloud within 1\.2 s"):
                edge.add(50)
    finally:
        over.set()
        if asking.ident is not None:
            asking.join()
        host.loopback.close()


def test_only_the_answers_to_others_are_told_of() -> None:
    """Not an edge's own: nothing would tell it that nothing moves any more."""
    host, heard = Adder(SessionLimits()), []
    host.beat_s = 0.1

    class Heard:
        def __init__(self, inner: Channel) -> None:
            self._inner, self.send, self.close = inner, inner.send, inner.close

        def receive(self, timeout_s: float) -> bytes:
            data = self._inner.receive(timeout_s)
            heard.append(unpack(data).kind)
            return data

    try:
        edge = Edge(host, wrap=Heard)
        assert edge.add(1, 2, 50) == [1, 3, 53]
        assert Kind.PING not in heard
        Edge(host).add(1)
        assert edge.add(50) == [103]
        assert heard.count(Kind.PING) == 1
    finally:
        host.loopback.close()
