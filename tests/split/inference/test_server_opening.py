"""Opening of sessions, and refused openings."""

from __future__ import annotations

import re
from enum import IntEnum

import msgpack
import pytest

from raycloud.link.frames import MAX_BODY, BusyReply, Frame, SessionKind, parse_body
from raycloud.split.inference.messages import InferenceKind
from raycloud.split.inference.server import InferenceServer
from tests.split.inference.peers import (
    ASKED,
    NARROW,
    Peer,
    converse,
)


def test_a_session_is_granted_what_the_limits_allow() -> None:
    async def talk(host: InferenceServer) -> None:
        granted = await Peer.connect(host).opened(max_tokens=60)
        assert (granted.lease_s, granted.max_step_tokens, granted.credit) == (7.0, 5, 3)
        assert granted.max_tokens == 60
        assert (await Peer.connect(host, session=b"t" * 16).opened(max_tokens=10**9)).max_tokens == 90
        assert host.sessions == 2

    converse(talk, lease_s=7, step_tokens=5, credit=3, tokens=90)


def test_no_more_tokens_are_granted_than_the_model_has_positions() -> None:
    async def talk(host: InferenceServer) -> None:
        assert (await Peer.connect(host).opened(max_tokens=10**9)).max_tokens == 128

    converse(talk)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"service": "signals"}, "service", "the edge asks for the service 'signals', this is 'inference'"),
        ({"fingerprint": "another"}, "fingerprint", "the edge's model another is not model"),
        ({"calibration": "c"}, "calibration", "calibrated differently"),
        ({"codec": "zip"}, "codec", "no codec 'zip'"),
        ({"codec": "int8"}, "codec", "needs a calibration"),
        ({"start_blocks": [0]}, "plan", r"blocks \[0, 4\) are asked for, \[1, 5\) are here"),
        ({"end_blocks": [6]}, "plan", r"blocks \[2, 6\)"),
        ({"end_blocks": [2**62]}, "plan", "are asked for"),
        ({"end_blocks": [2**64 - 1]}, "plan", "are asked for"),
        ({"start_blocks": [-1]}, "codec", "cuts of 0 or more"),
        ({"start_blocks": [4], "end_blocks": [2]}, "codec", "at or below"),
    ],
)
def test_openings_that_do_not_fit_are_refused(changes: dict[str, object], code: str, message: str) -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        refusal = await peer.refused(peer.opening(**changes), code)
        assert re.search(message, refusal.message), refusal.message
        assert host.sessions == 0
        await peer.opened()

    converse(talk, part=NARROW)


def test_one_id_is_one_session() -> None:
    async def talk(host: InferenceServer) -> None:
        await Peer.connect(host).opened()
        again = Peer.connect(host)
        await again.refused(again.opening(), "session")
        nameless = Peer.connect(host, session=bytes(16))
        await nameless.refused(nameless.opening(), "session")
        assert host.sessions == 1

    converse(talk)


@pytest.mark.parametrize("limits", [{"sessions": 2}, {"sessions_per_principal": 2}])
def test_too_many_sessions_have_to_wait(limits: dict[str, int]) -> None:
    async def talk(host: InferenceServer) -> None:
        peers = [Peer.connect(host, session=bytes([name]) * 16) for name in (1, 2, 3)]
        for peer in peers[:2]:
            await peer.opened()
        busy = await peers[2].open()
        assert busy.kind is SessionKind.BUSY
        assert parse_body(busy, BusyReply).retry_after_s > 0
        stranger = await Peer.connect(host, "you", b"y" * 16).open()
        assert stranger.kind is (SessionKind.BUSY if "sessions" in limits else SessionKind.OPEN_OK)
        await peers[0].ask(Frame(SessionKind.CLOSE, peers[0].session))
        await peers[2].opened()

    converse(talk, **limits)


@pytest.mark.parametrize("kind", sorted({*SessionKind, *InferenceKind} - {SessionKind.OPEN, SessionKind.RESUME}))
def test_every_conversation_begins_with_a_session(kind: IntEnum) -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        refusal = await peer.refused(Frame(kind, peer.session, body=ASKED.pack()), "handshake")
        assert f"{kind.name} came where OPEN or RESUME should have" in refusal.message

    converse(talk)


def test_attempts_to_open_are_counted() -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        for _ in range(3):
            await peer.refused(peer.opening(fingerprint="another"), "fingerprint")
        assert await peer.hear() is None
        await peer.served
        assert peer.wire.reason == "closed"

    converse(talk)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", msgpack.packb({"codec": 1}), bytes(MAX_BODY)],
    ids=["empty", "noise", "map", "huge"],
)
def test_openings_that_cannot_be_read_end_the_connection(payload: bytes) -> None:
    async def talk(host: InferenceServer) -> None:
        peer = Peer.connect(host)
        await peer.refused(Frame(SessionKind.OPEN, peer.session, body=payload), "frame")
        assert await peer.hear() is None
        await peer.served
        assert host.sessions == 0

    converse(talk)


@pytest.mark.waits
def test_connections_without_a_session_are_closed_in_time() -> None:
    async def talk(host: InferenceServer) -> None:
        silent, slow = Peer.connect(host), Peer.connect(host, session=b"t" * 16)
        await slow.refused(slow.opening(fingerprint="another"), "fingerprint")
        for peer in (silent, slow):
            assert await peer.hear() is None
            await peer.served
            assert peer.wire.reason == "no session was opened within 0.2 s"

    converse(talk, handshake_s=0.2)
