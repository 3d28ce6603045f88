"""Clouds that are busy, silent or unwilling: they are waited for, or end a generation with one clear line."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.codecs.boundary import plain_boundary
from raycloud.link.frames import Busy, Frame, Kind, Opened, Resumed, unpack
from raycloud.split.plan import PlanSet
from raycloud.split.remote import RemoteMiddle
from tests.split.wiring import (
    DRAWN,
    FIXED,
    NEW,
    PROMPT,
    WIDTH,
    Cloud,
    Script,
    cloud,
    name,
    refusal,
    stock,
)


class Actor:
    """A cloud of a few lines: answers each frame by a function, or not at all."""

    def __init__(self, answer: Callable[[Frame], list[Frame]]) -> None:
        self._answer, self._back = answer, list[bytes]()
        self.heard: list[Kind] = []
        self.connections = 0

    def __call__(self, session: str) -> Actor:
        self.connections += 1
        self._back.clear()
        return self

    def send(self, data: bytes) -> None:
        frame = unpack(data)
        self.heard.append(frame.kind)
        self._back += [reply.pack() for reply in self._answer(frame)]

    def receive(self, timeout_s: float) -> bytes:
        if not self._back:
            time.sleep(max(0.0, timeout_s))
            raise TimeoutError
        return self._back.pop(0)

    def close(self) -> None:
        pass


GRANT = Frame(Kind.OPEN_OK, payload=Opened(lease_s=60, max_tokens=128, max_rows=16, credit=4).pack())


def one_line(caught: pytest.ExceptionInfo[LinkError]) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    assert not isinstance(caught.value, LinkDown)
    return message


def test_a_cloud_that_cannot_be_reached_is_given_up_within_patience(there: Cloud) -> None:
    def refuse(session: str) -> Channel:
        raise LinkDown("connection refused")

    started = time.monotonic()
    with pytest.raises(LinkError, match=r"no answer from the cloud within 0\.5 s: connection refused") as caught:
        RemoteMiddle(refuse, there.terms(FIXED, patience_s=0.5))
    one_line(caught)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("opens", [False, True])
def test_a_cloud_that_never_answers_is_given_up_within_patience(there: Cloud, opens: bool) -> None:
    def answer(frame: Frame) -> list[Frame]:
        if opens and frame.kind is Kind.OPEN:
            return [GRANT]
        if opens and frame.kind is Kind.RESUME:
            return [Frame(Kind.RESUMED, payload=Resumed(tokens=0, next_seq=1).pack())]
        return []

    started = time.monotonic()
    with pytest.raises(LinkError, match=r"no answer from the cloud within 0\.6 s: no reply in time") as caught:
        list(there.edge(FIXED, Actor(answer), patience_s=0.6).stream(PROMPT[:4], 2))
    one_line(caught)
    assert time.monotonic() - started < 4


def test_patience_is_per_answer_not_per_generation(there: Cloud) -> None:
    def hook(what: str, number: int, data: bytes) -> bytes:
        if what == "send" and unpack(data).kind is Kind.STEP:
            time.sleep(0.06)
        return data

    edge = there.edge(FIXED, Script(there.connect, hook), patience_s=0.9)
    stream = edge.stream(PROMPT[:4], NEW)
    made = []
    for token in stream:
        made.append(token)
        if len(made) == 2:
            time.sleep(1.2)  # whoever reads may take their time
    assert made == stock(length=4)


@pytest.mark.parametrize("code", ["fingerprint", "calibration", "codec", "plan", "epoch"])
def test_a_refused_session_is_an_error_at_once(there: Cloud, code: str) -> None:
    actor = Actor(lambda frame: [refusal(code)])
    with pytest.raises(LinkError, match=f"the cloud refused the session: because of {code}") as caught:
        RemoteMiddle(actor, there.terms(FIXED))
    one_line(caught)
    assert actor.connections == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"fingerprint": "another"}, "model another is not model"), ({"plans": PlanSet((0,), (7,))}, "asked for")],
)
def test_terms_that_the_cloud_does_not_share_are_refused(
    there: Cloud, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(LinkError, match=message) as caught:
        RemoteMiddle(there.connect, replace(there.terms(FIXED), **changes))  # type: ignore[arg-type]
    one_line(caught)


def test_a_constructor_that_fails_leaves_no_channel_open(there: Cloud) -> None:
    closed = []

    class Watched(Actor):
        def close(self) -> None:
            closed.append(True)

    with pytest.raises(LinkError):
        RemoteMiddle(Watched(lambda frame: [refusal("fingerprint")]), there.terms(FIXED))
    assert closed


@pytest.mark.parametrize("code", ["credit", "non-finite", "internal", "position", "payload"])
def test_a_refused_step_is_an_error_at_once(there: Cloud, code: str) -> None:
    actor = Actor(lambda frame: [GRANT if frame.kind is Kind.OPEN else refusal(code, frame.seq)])
    with pytest.raises(LinkError, match=f"the cloud refused a request: because of {code}") as caught:
        list(there.edge(FIXED, actor).stream(PROMPT[:4], 2))
    one_line(caught)
    assert actor.connections == 1


@pytest.mark.parametrize("rows", [3, 5])
def test_other_rows_than_those_asked_for_are_an_error(there: Cloud, rows: int) -> None:
    def answer(frame: Frame) -> list[Frame]:
        return [GRANT if frame.kind is Kind.OPEN else Frame(Kind.STEP_OK, seq=frame.seq, rows=rows)]

    with pytest.raises(LinkError, match=f"sent {rows} rows from token 0, asked were 4 from 0") as caught:
        list(there.edge(FIXED, Actor(answer)).stream(PROMPT[:4], 2))
    one_line(caught)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "infinities or NaN"), (None, "cannot be decoded")])
def test_rows_that_are_no_numbers_are_an_error(there: Cloud, value: float | None, message: str) -> None:
    rows = torch.full((4, WIDTH), value or 0.0)
    payload = plain_boundary("float32", WIDTH).encode(rows, 0).numpy().tobytes()[: None if value else -1]

    def answer(frame: Frame) -> list[Frame]:
        return [GRANT if frame.kind is Kind.OPEN else Frame(Kind.STEP_OK, seq=frame.seq, rows=4, payload=payload)]

    with pytest.raises(LinkError, match=message) as caught:
        list(there.edge(FIXED, Actor(answer)).stream(PROMPT[:4], 2))
    one_line(caught)


@pytest.mark.parametrize("kind", [Kind.BUSY, Kind.GOAWAY])
def test_a_session_that_is_put_off_is_opened_later(there: Cloud, kind: Kind) -> None:
    put_off = Counter[str]()

    class Reluctant:
        def __init__(self, inner: Channel) -> None:
            self._inner, self._busy = inner, put_off["times"] < 3

        def send(self, data: bytes) -> None:
            if not self._busy:
                self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            if self._busy:
                put_off["times"] += 1
                return Frame(kind, payload=Busy(retry_after_s=0.01).pack()).pack()
            return self._inner.receive(timeout_s)

        def close(self) -> None:
            self._inner.close()

    assert list(there.edge(FIXED, lambda session: Reluctant(there.connect())).stream(PROMPT, NEW)) == stock()
    assert put_off["times"] == 3


@pytest.mark.parametrize("refused", [1, 2, 4])
def test_steps_that_are_put_off_are_sent_again_and_no_more_often_than_needed(there: Cloud, refused: int) -> None:
    """Four steps are away when one of them is put off, several times: those behind it are gaps."""
    sent, busy = Counter[int](), Counter[int]()

    class Reluctant:
        def __init__(self, inner: Channel) -> None:
            self._inner, self._back = inner, list[bytes]()

        def send(self, data: bytes) -> None:
            frame = unpack(data)
            if frame.kind is Kind.STEP:
                sent[frame.seq] += 1
                if frame.seq == refused and busy[refused] < 5:
                    # In the order of the stream: what is ahead is answered first.
                    busy[refused] += 1
                    self._inner.send(Frame(Kind.PING, frame.session, frame.epoch, frame.seq).pack())
                    return
            self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            data = self._inner.receive(timeout_s)
            frame = unpack(data)
            if frame.kind is Kind.PING:
                body = Busy(retry_after_s=0.01)
                return Frame(Kind.BUSY, frame.session, frame.epoch, frame.seq, payload=body.pack()).pack()
            return data

        def close(self) -> None:
            self._inner.close()

    edge = there.edge(FIXED, lambda session: Reluctant(there.connect()), chunk=6)
    assert list(edge.stream(PROMPT, NEW)) == stock()
    assert sent[refused] == 6
    assert all(times <= 3 for seq, times in sent.items() if seq != refused), sent


def test_a_cloud_that_stays_busy_is_given_up_within_patience(there: Cloud) -> None:
    def answer(frame: Frame) -> list[Frame]:
        busy = Frame(Kind.BUSY, seq=frame.seq, payload=Busy(retry_after_s=0.05).pack())
        return [GRANT if frame.kind is Kind.OPEN else busy]

    started = time.monotonic()
    with pytest.raises(LinkError, match=r"no answer from the cloud within 0\.5 s: it is busy") as caught:
        list(there.edge(FIXED, Actor(answer), patience_s=0.5).stream(PROMPT[:4], 2))
    one_line(caught)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("code", ["gone", "unknown-session", "expired"])
@pytest.mark.parametrize("plans", [FIXED, DRAWN], ids=name)
def test_steps_that_are_lost_for_good_begin_a_new_session(there: Cloud, code: str, plans: PlanSet) -> None:
    told = Counter[str]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        frame = unpack(data) if data else None
        if what == "received" and frame and frame.kind is Kind.STEP_OK and frame.seq in (3, 9) and told["times"] < 2:
            told["times"] += 1
            return refusal(code, frame.seq).pack()
        return data

    assert list(there.edge(plans, Script(there.connect, hook)).stream(PROMPT, NEW)) == stock()
    assert told["times"] == 2
    assert there.settled() == 0


def test_more_tokens_than_granted_are_an_error() -> None:
    with cloud(tokens=40) as there:
        edge = there.edge(FIXED)
        assert list(edge.stream(PROMPT, 8)) == stock()[:8]
        with pytest.raises(LinkError, match="the cloud grants 40 tokens, 41 are needed") as caught:
            list(edge.stream(PROMPT, NEW))
        one_line(caught)
        assert there.settled() == 0
