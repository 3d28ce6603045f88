"""Which steps a session accepts: every number of a header against what was granted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raycloud.link.codecs.boundary import plain_boundary
from raycloud.link.frames import HEADER_BYTES, MAX_FRAME, Frame, Kind
from raycloud.link.hosting import Refused
from raycloud.split.cloud.limits import Limits
from raycloud.split.cloud.session import Session
from raycloud.split.middle import middle_state
from raycloud.split.plan import PlanSet, SplitPlan
from tests.split.cloud.peers import BLOCKS, MIDDLE

WIDTH = 32
PLANS = PlanSet((1, 2, 4), (2, 4, 6))


def session(**limits: Any) -> Session:
    """One that knows 10 tokens after 3 steps."""
    return Session(
        id=b"s" * 16,
        principal="me",
        state=middle_state(MIDDLE, PLANS, BLOCKS),
        plans=PLANS,
        boundaries={cut: plain_boundary("float32", WIDTH) for cut in PLANS.cuts},
        codec=0,
        max_tokens=40,
        limits=Limits(**{"rows": 16, **limits}),
        tokens=10,
        next_seq=4,
    )


def step(**changes: Any) -> Frame:
    frame = Frame(Kind.STEP, b"s" * 16, 0, 4, keep=10, pos=10, rows=3, out_rows=3, first=2, second=4)
    frame = replace(frame, **changes)
    return frame if "payload" in changes else replace(frame, payload=bytes(frame.rows * WIDTH * 4))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first": 1, "second": 6},
        {"rows": 16, "out_rows": 0},
        {"rows": 1, "out_rows": 11},
        {"pos": 0, "rows": 13},
        {"pos": 5, "keep": 5, "rows": 2},
        {"pos": 0, "keep": 0, "rows": 1, "out_rows": 1},
        {"kind": Kind.REPLAY, "out_rows": 0},
    ],
)
def test_steps_within_the_grant_pass(changes: dict[str, Any]) -> None:
    frame = step(**changes)
    assert session().check(frame) == SplitPlan(frame.first, frame.second)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"codec": 1}, "codec", "codec 1 was not agreed on"),
        ({"first": 0}, "plan", r"cuts \(0, 4\)"),
        ({"second": 5}, "plan", r"cuts \(2, 5\)"),
        ({"first": 4, "second": 2}, "plan", r"cuts \(4, 2\)"),
        ({"first": 2, "second": 2}, "plan", "nothing to do"),
        ({"first": 65535, "second": 65535}, "plan", "not agreed on"),
        ({"rows": 0}, "rows", "1 to 16 rows, got 0"),
        ({"rows": 17}, "rows", "1 to 16 rows, got 17"),
        ({"rows": 2**32 - 1, "payload": b""}, "rows", "1 to 16 rows"),
        ({"pos": 11, "keep": 11}, "position", "do not follow 11 of 10 tokens"),
        ({"pos": 11}, "position", "do not follow"),
        ({"pos": 5, "keep": 4}, "position", "do not follow"),
        ({"keep": 11}, "position", "do not follow"),
        ({"pos": 2**32 - 1, "keep": 2**32 - 1}, "tokens", "beyond the 40 granted"),
        ({"out_rows": 14}, "rows", "14 rows cannot come back from 13 tokens"),
        ({"out_rows": 2**32 - 1}, "rows", "cannot come back"),
        ({"kind": Kind.REPLAY}, "rows", "3 rows cannot come back"),
        ({"payload": b""}, "payload", "3 rows have 384 bytes, got 0"),
        ({"payload": bytes(383)}, "payload", "got 383"),
        ({"payload": bytes(385)}, "payload", "got 385"),
    ],
)
def test_steps_beyond_the_grant_are_refused(changes: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        session().check(step(**changes))
    assert caught.value.code == code


def test_a_step_may_end_with_the_last_token_granted() -> None:
    held = session()
    held.tokens = 38
    held.check(step(keep=38, pos=38, rows=2, out_rows=2))
    with pytest.raises(Refused, match="token 41 is beyond the 40 granted"):
        held.check(step(keep=38, pos=38, rows=3))


def test_replies_that_no_frame_can_hold_are_refused_before_they_are_computed() -> None:
    held = session()
    most = (MAX_FRAME - HEADER_BYTES) // (WIDTH * 4)
    held.tokens, held.max_tokens = most, most + 10
    held.check(step(keep=most, pos=most, out_rows=most))
    with pytest.raises(Refused, match=f"{most + 1} rows do not fit one frame"):
        held.check(step(keep=most, pos=most, out_rows=most + 1))


def test_accepted_steps_move_the_session_on() -> None:
    held = session()
    held.extend(step())
    assert held.tokens == 13
    held.extend(step(pos=2, keep=13, rows=3))  # catches up below what is known
    assert held.tokens == 13
    held.extend(step(pos=4, keep=4, rows=2))  # and this one forgets
    assert held.tokens == 6
