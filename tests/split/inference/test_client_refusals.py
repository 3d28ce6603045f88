"""Clouds that are busy, silent or refuse: the edge waits, or ends the generation with one clear line."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import Any

import pytest
import torch

from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown
from raycloud.link.client import _FAREWELL_S
from raycloud.link.codecs.cut_codec import float_cut_codec
from raycloud.link.frames import BusyReply, Frame, ResumeReply, SessionKind, unpack
from raycloud.split.inference.client import RemoteBlocks
from raycloud.split.inference.messages import InferenceGrant, InferenceKind, StepMessage
from raycloud.split.plan import PlanSet
from tests.clock import Clock
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
    """Minimal cloud that answers each frame with a function, or not at all."""

    def __init__(self, answer: Callable[[Frame], list[Frame]]) -> None:
        self._answer, self._back = answer, list[bytes]()
        self.heard: list[IntEnum] = []
        self.connections = 0
        self.clock: Any = time

    def __call__(self, session: str) -> Actor:
        self.connections += 1
        self._back.clear()
        return self

    def send(self, data: bytes) -> None:
        frame = unpack(data, InferenceKind)
        self.heard.append(frame.kind)
        self._back += [reply.pack() for reply in self._answer(frame)]

    def receive(self, timeout_s: float) -> bytes:
        if not self._back:
            self.clock.sleep(max(0.0, timeout_s))
            raise TimeoutError
        return self._back.pop(0)

    def close(self) -> None:
        pass


GRANT = Frame(SessionKind.OPEN_OK, body=InferenceGrant(lease_s=60, max_tokens=128, max_step_tokens=16, credit=4).pack())


def one_line(caught: pytest.ExceptionInfo[LinkError]) -> str:
    message = str(caught.value)
    assert message and "\n" not in message
    assert not isinstance(caught.value, LinkDown)
    return message


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Fake clock by which the edge's patience is measured."""
    made = Clock()
    monkeypatch.setattr("raycloud.link.client.time", made)
    return made


@pytest.mark.waits
def test_a_cloud_that_cannot_be_reached_is_given_up_within_patience(there: Cloud, clock: Clock) -> None:
    def refuse(session: str) -> Channel:
        raise LinkDown("connection refused")

    with pytest.raises(LinkError, match=r"no answer from the cloud within 50 s: connection refused") as caught:
        RemoteBlocks(refuse, there.terms(FIXED, patience_s=50))
    one_line(caught)
    assert 40 < clock.now <= 50


@pytest.mark.waits
@pytest.mark.parametrize("opens", [False, True])
def test_a_cloud_that_never_answers_is_given_up_within_patience(there: Cloud, clock: Clock, opens: bool) -> None:
    def answer(frame: Frame) -> list[Frame]:
        if opens and frame.kind is SessionKind.OPEN:
            return [GRANT]
        if opens and frame.kind is SessionKind.RESUME:
            return [Frame(SessionKind.RESUMED, body=ResumeReply(next_seq=1).pack())]
        return []

    actor = Actor(answer)
    actor.clock = clock
    with pytest.raises(LinkError, match=r"no answer from the cloud within 60 s: no reply in time") as caught:
        list(there.edge(FIXED, actor, patience_s=60).stream(PROMPT[:4], 2))
    one_line(caught)
    # The last answer may be awaited for a third of it, and goodbye is said.
    assert 40 < clock.now <= 80 + _FAREWELL_S


@pytest.mark.waits
def test_patience_is_per_answer_not_per_generation(there: Cloud, clock: Clock) -> None:
    def hook(what: str, number: int, data: bytes) -> bytes:
        if what == "send" and unpack(data, InferenceKind).kind is InferenceKind.STEP:
            clock.sleep(6)
        return data

    edge = there.edge(FIXED, Script(there.connect, hook), patience_s=90)
    stream = edge.stream(PROMPT[:4], NEW)
    made = []
    for token in stream:
        made.append(token)
        if len(made) == 2:
            clock.sleep(120)  # whoever reads may take their time
    assert made == stock(length=4)
    assert clock.now >= 120 + 6 * NEW > 90


@pytest.mark.parametrize("code", ["fingerprint", "calibration", "codec", "plan", "epoch"])
def test_a_refused_session_is_an_error_at_once(there: Cloud, code: str) -> None:
    actor = Actor(lambda frame: [refusal(code)])
    with pytest.raises(LinkError, match=f"the cloud refused the session: because of {code}") as caught:
        RemoteBlocks(actor, there.terms(FIXED))
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
        RemoteBlocks(there.connect, replace(there.terms(FIXED), **changes))  # type: ignore[arg-type]
    one_line(caught)


def test_a_constructor_that_fails_leaves_no_channel_open(there: Cloud) -> None:
    closed = []

    class Watched(Actor):
        def close(self) -> None:
            closed.append(True)

    with pytest.raises(LinkError):
        RemoteBlocks(Watched(lambda frame: [refusal("fingerprint")]), there.terms(FIXED))
    assert closed


@pytest.mark.parametrize("code", ["credit", "non-finite", "internal", "position", "payload"])
def test_a_refused_step_is_an_error_at_once(there: Cloud, code: str) -> None:
    actor = Actor(lambda frame: [GRANT if frame.kind is SessionKind.OPEN else refusal(code, frame.seq)])
    with pytest.raises(LinkError, match=f"the cloud refused a request: because of {code}") as caught:
        list(there.edge(FIXED, actor).stream(PROMPT[:4], 2))
    one_line(caught)
    assert actor.connections == 1


@pytest.mark.parametrize("tokens", [3, 5])
def test_other_hidden_states_than_those_asked_for_are_an_error(there: Cloud, tokens: int) -> None:
    def answer(frame: Frame) -> list[Frame]:
        if frame.kind is SessionKind.OPEN:
            return [GRANT]
        step = replace(StepMessage.parse(frame), wanted=tokens)
        return [Frame(InferenceKind.STEP_OK, seq=frame.seq, body=step.pack())]

    with pytest.raises(LinkError, match=rf"the cloud answered .*wanted={tokens},.* to .*wanted=4,") as caught:
        list(there.edge(FIXED, Actor(answer)).stream(PROMPT[:4], 2))
    one_line(caught)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "infinities or NaN"), (None, "cannot be decoded")])
def test_hidden_states_that_are_no_numbers_are_an_error(there: Cloud, value: float | None, message: str) -> None:
    hidden = torch.full((4, WIDTH), value or 0.0)
    payload = float_cut_codec("float32", WIDTH).encode(hidden, 0).numpy().tobytes()[: None if value else -1]

    def answer(frame: Frame) -> list[Frame]:
        if frame.kind is SessionKind.OPEN:
            return [GRANT]
        return [Frame(InferenceKind.STEP_OK, seq=frame.seq, body=frame.body, raw=payload)]

    with pytest.raises(LinkError, match=message) as caught:
        list(there.edge(FIXED, Actor(answer)).stream(PROMPT[:4], 2))
    one_line(caught)


@pytest.mark.parametrize("kind", [SessionKind.BUSY, SessionKind.GOAWAY])
def test_a_session_that_is_put_off_is_opened_later(there: Cloud, kind: IntEnum) -> None:
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
                return Frame(kind, body=BusyReply(retry_after_s=0.01).pack()).pack()
            return self._inner.receive(timeout_s)

        def close(self) -> None:
            self._inner.close()

    assert list(there.edge(FIXED, lambda session: Reluctant(there.connect())).stream(PROMPT, NEW)) == stock()
    assert put_off["times"] == 3


@pytest.mark.parametrize("refused", [1, 2, 4])
def test_steps_that_are_put_off_are_sent_again_and_no_more_often_than_needed(there: Cloud, refused: int) -> None:
    """Four steps are in flight when one of them is deferred several times; the later ones are gaps."""
    sent, busy = Counter[int](), Counter[int]()

    class Reluctant:
        def __init__(self, inner: Channel) -> None:
            self._inner, self._back = inner, list[bytes]()

        def send(self, data: bytes) -> None:
            frame = unpack(data, InferenceKind)
            if frame.kind is InferenceKind.STEP:
                sent[frame.seq] += 1
                if frame.seq == refused and busy[refused] < 5:
                    # In the order of the stream: what is ahead is answered first.
                    busy[refused] += 1
                    self._inner.send(Frame(SessionKind.PING, frame.session, frame.epoch, frame.seq).pack())
                    return
            self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            data = self._inner.receive(timeout_s)
            frame = unpack(data, InferenceKind)
            if frame.kind is SessionKind.PING:
                body = BusyReply(retry_after_s=0.01)
                return Frame(SessionKind.BUSY, frame.session, frame.epoch, frame.seq, body=body.pack()).pack()
            return data

        def close(self) -> None:
            self._inner.close()

    edge = there.edge(FIXED, lambda session: Reluctant(there.connect()), chunk=6)
    assert list(edge.stream(PROMPT, NEW)) == stock()
    assert sent[refused] == 6
    assert all(times <= 3 for seq, times in sent.items() if seq != refused), sent


@pytest.mark.waits
def test_a_cloud_that_stays_busy_is_given_up_within_patience(there: Cloud, clock: Clock) -> None:
    def answer(frame: Frame) -> list[Frame]:
        busy = Frame(SessionKind.BUSY, seq=frame.seq, body=BusyReply(retry_after_s=0.05).pack())
        return [GRANT if frame.kind is SessionKind.OPEN else busy]

    with pytest.raises(LinkError, match=r"no answer from the cloud within 50 s: it is busy") as caught:
        list(there.edge(FIXED, Actor(answer), patience_s=50).stream(PROMPT[:4], 2))
    one_line(caught)
    assert 40 < clock.now <= 51


@pytest.mark.parametrize("code", ["gone", "unknown-session", "expired"])
@pytest.mark.parametrize("plans", [FIXED, DRAWN], ids=name)
def test_steps_that_are_lost_for_good_begin_a_new_session(there: Cloud, code: str, plans: PlanSet) -> None:
    told = Counter[str]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        frame = unpack(data, InferenceKind) if data else None
        if (
            what == "received"
            and frame
            and frame.kind is InferenceKind.STEP_OK
            and frame.seq in (3, 9)
            and told["times"] < 2
        ):
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
