"""Channels that break, lose, repeat or damage messages: the tokens stay those of the unsplit model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from enum import IntEnum

import pytest

from raycloud.link.channel import Channel, LinkDown
from raycloud.link.frames import SessionKind, unpack
from raycloud.split.inference.messages import InferenceKind
from raycloud.split.plan import PlanSet
from tests.clock import Clock
from tests.split.wiring import (
    DRAWN,
    FIXED,
    NEW,
    PLANS,
    PROMPT,
    Cloud,
    Script,
    name,
    stock,
)


def cut_at(event: int, lose: Callable[[], None] = lambda: None) -> Callable[[str, int, bytes], bytes]:
    def hook(what: str, number: int, data: bytes) -> bytes:
        if number == event:
            lose()
            raise LinkDown(f"cut at {what}")
        return data

    return hook


def events(there: Cloud, plans: PlanSet, limit: int) -> int:
    """List the events at which a channel may break: before and after each frame in either direction."""
    script = Script(there.connect, lambda what, number, data: data)
    list(there.edge(plans, script, chunk=10).stream(PROMPT[:20], limit))
    return script.events


@pytest.mark.parametrize("loses", [False, True], ids=["cut", "cut-and-lost"])
@pytest.mark.parametrize("plans", [FIXED, PLANS[1], DRAWN], ids=name)
def test_a_cut_at_any_moment_changes_nothing(there: Cloud, plans: PlanSet, loses: bool) -> None:
    right = stock(length=20)[:4]
    total = events(there, plans, 4)
    assert total >= 4 * (1 + 2 + 3)
    for event in range(total - 5):  # the last five are of the farewell
        script = Script(there.connect, cut_at(event, there.forget if loses else lambda: None))
        made = list(there.edge(plans, script, chunk=10).stream(PROMPT[:20], 4))
        assert made == right, event
        # After a frame was sent, the answer may have been faster than the cut.
        assert script.channels >= 2 or event % 2, event
    there.forget()


@pytest.mark.parametrize("plans", [FIXED, DRAWN], ids=name)
@pytest.mark.parametrize("gap", [1, 2, 3])
def test_two_cuts_close_to_each_other_change_nothing(there: Cloud, plans: PlanSet, gap: int) -> None:
    """The second break comes during the reconnection: OPEN_OK, RESUMED or a replay is lost too."""
    right, total = stock(length=20)[:3], events(there, plans, 3)
    for event in range(0, total - 5, 3):

        def hook(what: str, number: int, data: bytes, event: int = event) -> bytes:
            if number == event:
                there.forget()
            if number in (event, event + gap):
                raise LinkDown("cut")
            return data

        made = list(there.edge(plans, Script(there.connect, hook), chunk=10).stream(PROMPT[:20], 3))
        assert made == right, event
    there.forget()


def test_the_answer_to_a_new_beginning_may_be_lost(there: Cloud) -> None:
    """A new session whose OPEN_OK was lost must not be mistaken for the old one."""
    lost = Counter[str]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        if number == 20:
            there.forget()
            raise LinkDown("cut")
        if (
            what == "received"
            and number > 20
            and unpack(data, InferenceKind).kind is SessionKind.OPEN_OK
            and lost["times"] < 2
        ):
            lost["times"] += 1
            raise LinkDown("cut")
        return data

    edge = there.edge(FIXED, Script(there.connect, hook))
    assert list(edge.stream(PROMPT, NEW)) == stock()
    assert lost["times"] == 2
    there.forget()


@pytest.mark.parametrize("plans", [FIXED, PLANS[1], DRAWN], ids=name)
@pytest.mark.parametrize("after", [1, 6, 11])
def test_a_cloud_that_lost_everything_is_brought_up_to_date(there: Cloud, plans: PlanSet, after: int) -> None:
    made, kinds = [], Counter[IntEnum]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        if what == "send":
            kinds[unpack(data, InferenceKind).kind] += 1
        return data

    for token in there.edge(plans, Script(there.connect, hook)).stream(PROMPT, NEW):
        made.append(token)
        if len(made) == after:
            there.forget()
    assert made == stock()
    # Whatever a drawn plan asks for next; from token 0 on there may be nothing to repeat.
    assert kinds[SessionKind.OPEN] == 2
    assert kinds[InferenceKind.REPLAY] >= (1 if plans.fixed else 0)


@pytest.mark.parametrize("direction", ["send", "received"])
def test_a_flipped_byte_in_transit_changes_nothing(there: Cloud, direction: str) -> None:
    rng = random.Random(5)
    damaged = Counter[str]()

    def hook(what: str, number: int, data: bytes) -> bytes:
        if what == direction and rng.random() < 0.15:
            damaged[what] += 1
            at = rng.randrange(len(data))
            return data[:at] + bytes([data[at] ^ rng.randrange(1, 256)]) + data[at + 1 :]
        return data

    for plans in (FIXED, DRAWN):
        assert list(there.edge(plans, Script(there.connect, hook)).stream(PROMPT, NEW)) == stock()
    assert damaged[direction] >= 4
    there.forget()


@pytest.mark.waits
def test_replies_that_come_twice_or_are_dropped_change_nothing(there: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped message is detected by a timeout, a third of the patience."""
    monkeypatch.setattr("raycloud.link.client.time", Clock())  # which does not run out
    dropped = Counter[str]()

    class Odd:
        def __init__(self, inner: Channel) -> None:
            self._inner, self._again = inner, b""

        def send(self, data: bytes) -> None:
            for _ in range(2 if unpack(data, InferenceKind).kind is InferenceKind.STEP else 1):
                self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            data = self._inner.receive(timeout_s)
            kind = unpack(data, InferenceKind).kind
            if kind is InferenceKind.STEP_OK and dropped["seen"] >= 7 and not dropped["times"]:
                dropped["times"] += 1
                data = self._inner.receive(timeout_s)
            dropped["seen"] += 1
            return data

        def close(self) -> None:
            self._inner.close()

    edge = there.edge(FIXED, lambda session: Odd(there.connect()), patience_s=3.0)
    assert list(edge.stream(PROMPT, NEW)) == stock()
    assert dropped["times"] == 1
