"""Steps that a session accepts: every number of a header against what was granted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raycloud.link.codecs.cut_codec import float_cut_codec
from raycloud.link.frames import MAX_MESSAGE, Frame
from raycloud.link.server import RequestRefused
from raycloud.split.inference.blocks import cloud_stage
from raycloud.split.inference.cloud_session import InferenceSession
from raycloud.split.inference.limits import InferenceLimits
from raycloud.split.inference.messages import InferenceKind, StepMessage
from raycloud.split.plan import PlanSet
from tests.split.inference.peers import BLOCKS, MIDDLE, changed

WIDTH = 32
PLANS = PlanSet((1, 2, 4), (2, 4, 6))


def session(**limits: Any) -> InferenceSession:
    """Make a session that has 10 tokens after 3 steps."""
    return InferenceSession(
        id=b"s" * 16,
        principal="me",
        state=cloud_stage(MIDDLE, PLANS, BLOCKS),
        plans=PLANS,
        cut_codecs={cut: float_cut_codec("float32", WIDTH) for cut in PLANS.cuts},
        max_tokens=40,
        limits=InferenceLimits(**{"step_tokens": 16, **limits}),
        tokens=10,
        next_seq=4,
    )


def step(**changes: Any) -> Frame:
    message = StepMessage(2, 4, keep=10, start=10, tokens=3, wanted=3)
    frame = changed(Frame(InferenceKind.STEP, b"s" * 16, 0, 4, body=message.pack()), **changes)
    return frame if "raw" in changes else replace(frame, raw=bytes(StepMessage.parse(frame).tokens * WIDTH * 4))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"start_block": 1, "end_block": 6},
        {"tokens": 16, "wanted": 0},
        {"tokens": 1, "wanted": 11},
        {"start": 0, "tokens": 13},
        {"start": 5, "keep": 5, "tokens": 2},
        {"start": 0, "keep": 0, "tokens": 1, "wanted": 1},
        {"kind": InferenceKind.REPLAY, "wanted": 0},
    ],
)
def test_steps_within_the_grant_pass(changes: dict[str, Any]) -> None:
    frame = step(**changes)
    assert session().check(frame) == StepMessage.parse(frame)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"start_block": 0}, "plan", r"cuts \(0, 4\)"),
        ({"end_block": 5}, "plan", r"cuts \(2, 5\)"),
        ({"start_block": 4, "end_block": 2}, "plan", r"cuts \(4, 2\)"),
        ({"start_block": 2, "end_block": 2}, "plan", "nothing to do"),
        ({"start_block": 65535, "end_block": 65535}, "plan", "not agreed on"),
        ({"tokens": 0}, "tokens", "1 to 16 tokens, got 0"),
        ({"tokens": 17}, "tokens", "1 to 16 tokens, got 17"),
        ({"tokens": 2**16 - 1, "raw": b""}, "tokens", "1 to 16 tokens"),
        ({"start": 11, "keep": 11}, "position", "do not follow 11 of 10 tokens"),
        ({"start": 11}, "position", "do not follow"),
        ({"start": 5, "keep": 4}, "position", "do not follow"),
        ({"keep": 11}, "position", "do not follow"),
        ({"start": 2**16 - 1, "keep": 2**16 - 1}, "tokens", "beyond the 40 granted"),
        ({"wanted": 14}, "tokens", "14 hidden states cannot come back from 13 tokens"),
        ({"wanted": 2**16 - 1}, "tokens", "cannot come back"),
        ({"kind": InferenceKind.REPLAY}, "tokens", "3 hidden states cannot come back"),
        ({"raw": b""}, "payload", "3 tokens have 384 bytes, got 0"),
        ({"raw": bytes(383)}, "payload", "got 383"),
        ({"raw": bytes(385)}, "payload", "got 385"),
    ],
)
def test_steps_beyond_the_grant_are_refused(changes: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(RequestRefused, match=message) as caught:
        session().check(step(**changes))
    assert caught.value.code == code


def test_a_step_may_end_with_the_last_token_granted() -> None:
    held = session()
    held.tokens = 38
    held.check(step(keep=38, start=38, tokens=2, wanted=2))
    with pytest.raises(RequestRefused, match="token 41 is beyond the 40 granted"):
        held.check(step(keep=38, start=38, tokens=3))


def test_replies_that_no_message_can_hold_are_refused_before_they_are_computed() -> None:
    held, most = session(), MAX_MESSAGE // (WIDTH * 4)
    held.tokens, held.max_tokens = most, most + 10
    held.check(step(keep=most, start=most, wanted=most - 1))
    with pytest.raises(RequestRefused, match=f"{most + 1} hidden states do not fit one reply"):
        held.check(step(keep=most, start=most, wanted=most + 1))


def test_accepted_steps_move_the_session_on() -> None:
    def message(start: int, tokens: int, keep: int) -> StepMessage:
        return StepMessage(2, 4, keep, start, tokens, 0)

    held = session()
    held.extend(message(10, 3, keep=10))
    assert held.tokens == 13
    held.extend(message(2, 3, keep=13))  # catches up below what is known
    assert held.tokens == 13
    held.extend(message(4, 2, keep=4))  # and this one forgets
    assert held.tokens == 6
