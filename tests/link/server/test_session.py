"""State of a session about its requests: order, repeats, latest replies, and lease."""

from __future__ import annotations

from asyncio import Future
from typing import Any

import pytest

from raycloud.link.frames import Frame
from raycloud.link.server import RequestRefused, Session, SessionLimits
from tests.link.adder import AdderKind


def session(**limits: Any) -> Session:
    """Make a session that accepted 3 requests."""
    return Session(id=b"s" * 16, principal="me", limits=SessionLimits(**limits), next_seq=4)


def request(seq: int) -> Frame:
    return Frame(AdderKind.ADD, b"s" * 16, seq=seq)


def test_only_known_requests_are_repeats() -> None:
    held = session()
    held.replies[3] = Frame(AdderKind.ADD_OK, seq=3)
    held.pending[2] = Future.__new__(Future)
    assert not held.repeated(request(4))
    assert held.repeated(request(3))
    assert held.repeated(request(2))
    for seq, code in ((0, "gap"), (5, "gap"), (2**64 - 1, "gap"), (1, "gone")):
        with pytest.raises(RequestRefused) as caught:
            held.repeated(request(seq))
        assert caught.value.code == code


def test_accepted_requests_move_the_session_on() -> None:
    held = session()
    for seq in (4, 5):
        held.accept(request(seq), Future.__new__(Future))
    assert held.next_seq == 6 and list(held.pending) == [4, 5]
    held.keep_reply(Frame(AdderKind.ADD_OK, seq=4))
    assert list(held.pending) == [5] and list(held.replies) == [4]
    assert held.repeated(request(4)) and held.repeated(request(5)) and not held.repeated(request(6))


def test_only_the_latest_replies_are_kept() -> None:
    held = session(credit=3)
    for seq in range(1, 8):
        held.keep_reply(Frame(AdderKind.ADD_OK, seq=seq))
    assert list(held.replies) == [5, 6, 7]


def test_any_frame_renews_the_lease() -> None:
    held = session(lease_s=30)
    held.renew(100.0)
    assert held.expires == 130.0


def test_more_credit_than_a_connection_may_be_ahead_is_refused() -> None:
    with pytest.raises(ValueError, match=r"credit=17: .* unanswered=16; allowed: no more credit than that"):
        session(credit=17)
