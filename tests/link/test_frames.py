"""Frames: a header of 52 bytes, damage is detected, bodies are maps with a schema and execute nothing."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import struct
from enum import IntEnum

import google_crc32c
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from raycloud.link.frames import (
    HEADER_BYTES,
    MAX_BODY,
    MAX_FRAME,
    PIECE_BYTES,
    BusyReply,
    ErrorReply,
    Frame,
    FrameError,
    OpenRequest,
    ResumeReply,
    SessionGrant,
    SessionKind,
    message_size,
    parse_body,
    unpack,
)


class OpenPainting(OpenRequest):
    service: str = "painting"
    fingerprint: str = Field(max_length=128)
    codec: str
    start_blocks: list[int] = Field(min_length=1, max_length=512)
    end_blocks: list[int]
    max_tokens: int = Field(ge=1)


class PaintKind(IntEnum):
    STROKE = 16
    STROKE_OK = 200


ASKED = OpenPainting(fingerprint="abc", codec="float32", start_blocks=[2], end_blocks=[4], max_tokens=100)


def u(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, 2**bits - 1)


frames = st.builds(
    Frame,
    kind=st.one_of(st.sampled_from(SessionKind), st.sampled_from(PaintKind)),
    session=st.binary(min_size=16, max_size=16),
    epoch=u(32),
    seq=u(32),
    ack=u(32),
    body=st.binary(max_size=300),
    raw=st.binary(max_size=300),
    offset=u(32),
    rest=u(32),
)


def example(body: bytes = b"a map", raw: bytes = b"hidden") -> Frame:
    return Frame(PaintKind.STROKE, os.urandom(16), 3, 7, 6, body, raw)


def sealed(head: bytes, payload: bytes = b"") -> bytes:
    """Make a frame with a valid checksum and any header."""
    return head + struct.pack("<I", google_crc32c.extend(google_crc32c.value(head), payload)) + payload


@settings(max_examples=150, deadline=None)
@given(frames)
def test_every_field_arrives_as_it_was(frame: Frame) -> None:
    data = frame.pack()
    assert len(data) == 52 + len(frame.body) + len(frame.raw) == frame.size
    assert data[HEADER_BYTES:] == frame.body + frame.raw
    assert unpack(data, PaintKind) == frame


def test_the_header_has_52_bytes_and_begins_with_the_magic() -> None:
    data = Frame(SessionKind.PING).pack()
    assert HEADER_BYTES == len(data) == 52
    assert data[:4] == b"RCLD"


def test_every_flipped_byte_is_refused() -> None:
    data = example().pack()
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            with pytest.raises(FrameError):
                unpack(bytes(damaged), PaintKind)


def test_every_truncation_and_every_trailing_byte_is_refused() -> None:
    data = example().pack()
    for length in range(len(data)):
        with pytest.raises(FrameError):
            unpack(data[:length], PaintKind)
    with pytest.raises(FrameError, match="5 bytes of body and 6 of raw data, there are 12"):
        unpack(data + b"\0", PaintKind)


def test_the_largest_frame_passes_and_one_byte_more_does_not() -> None:
    largest = Frame(SessionKind.PING, body=bytes(MAX_BODY), raw=bytes(PIECE_BYTES))
    assert unpack(largest.pack()) == largest and len(largest.pack()) == MAX_FRAME
    with pytest.raises(FrameError, match=f"at most {MAX_BODY} bytes, got {MAX_BODY + 1}"):
        dataclasses.replace(largest, body=bytes(MAX_BODY + 1)).pack()
    with pytest.raises(FrameError, match=f"at most {PIECE_BYTES} raw bytes, got {PIECE_BYTES + 1}"):
        dataclasses.replace(largest, raw=bytes(PIECE_BYTES + 1)).pack()
    with pytest.raises(FrameError, match=f"52 to {MAX_FRAME} bytes"):
        unpack(bytes(MAX_FRAME + 1))


def test_a_kind_is_known_only_to_its_service() -> None:
    data = Frame(PaintKind.STROKE).pack()
    assert unpack(data, PaintKind).kind is PaintKind.STROKE
    with pytest.raises(FrameError, match="no frame kind 16"):
        unpack(data)


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES - 7])
def test_large_raw_bytes_cross_in_pieces(size: int) -> None:
    frame = example(raw=random.Random(size).randbytes(size))
    pieces = [unpack(data, PaintKind) for data in frame.pieces()]
    assert b"".join(piece.raw for piece in pieces) == frame.raw
    assert [piece.body for piece in pieces] == [frame.body] + [b""] * (len(pieces) - 1)
    assert sum(len(data) for data in frame.pieces()) == frame.size == message_size(len(frame.body), size)
    assert all(piece.offset + len(piece.raw) + piece.rest == size for piece in pieces)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (slice(0, 4), b"HTTP", "magic b'HTTP'"),
        (slice(4, 5), b"\1", "version 1"),
        (slice(5, 6), b"\0", "no frame kind 0"),
        (slice(5, 6), b"\x63", "no frame kind 99"),
        (slice(6, 8), b"\xff\xff", "65535 bytes of body and 0 of raw data, there are 0"),
        (slice(44, 48), b"\xff\xff\xff\xff", "0 bytes of body and 4294967295 of raw data, there are 0"),
    ],
)
def test_wrong_fields_are_named_even_where_the_checksum_fits(at: slice, value: bytes, message: str) -> None:
    head = bytearray(Frame(SessionKind.PING).pack()[:48])
    head[at] = value
    with pytest.raises(FrameError, match=message):
        unpack(sealed(bytes(head)))


@pytest.mark.parametrize(
    "wrong",
    [{"rest": -1}, {"seq": 2**32}, {"epoch": 2**32}, {"offset": 2**32}],
)
def test_numbers_that_do_not_fit_are_not_sent(wrong: dict[str, float]) -> None:
    with pytest.raises(FrameError, match="does not fit"):
        Frame(SessionKind.PING, **wrong).pack()  # type: ignore[arg-type]


def test_noise_is_no_frame() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        noise = rng.randbytes(rng.randrange(200))
        for data in (noise, b"RCLD\2\3" + noise):
            with pytest.raises(FrameError):
                unpack(data)


@pytest.mark.parametrize(
    "content",
    [
        ASKED,
        SessionGrant(lease_s=60.0, credit=4),
        ResumeReply(next_seq=2, received=5),
        BusyReply(retry_after_s=0.5),
        ErrorReply(code="gap", message="step 9 came"),
    ],
)
def test_bodies_arrive_as_they_were(
    content: OpenPainting | SessionGrant | ResumeReply | BusyReply | ErrorReply,
) -> None:
    assert parse_body(unpack(Frame(SessionKind.OPEN, body=content.pack()).pack()), type(content)) == content


def test_keys_of_later_versions_are_ignored() -> None:
    later = msgpack.packb({**ASKED.model_dump(), "colour": "green", "adapters": [1, {"a": b"b"}]})
    assert parse_body(Frame(SessionKind.OPEN, body=later), OpenPainting) == ASKED


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": 5},
        {"fingerprint": "a" * 129},
        {"codec": None},
        {"start_blocks": []},
        {"start_blocks": "2"},
        {"start_blocks": [[2]]},
        {"start_blocks": list(range(513))},
        {"end_blocks": {"4": 4}},
        {"max_tokens": 0},
        {"max_tokens": float("nan")},
        {"max_tokens": "many"},
    ],
)
def test_wrong_values_are_refused_and_named(change: dict[str, object]) -> None:
    payload = msgpack.packb({**ASKED.model_dump(), **change})
    with pytest.raises(FrameError, match=f"OPEN: {next(iter(change))}") as caught:
        parse_body(Frame(SessionKind.OPEN, body=payload), OpenPainting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1.0])
def test_no_one_is_told_to_come_back_before_now(value: float) -> None:
    with pytest.raises(FrameError, match="retry_after_s"):
        parse_body(Frame(SessionKind.BUSY, body=msgpack.packb({"retry_after_s": value})), BusyReply)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"{}",
        msgpack.packb([1, 2]),
        msgpack.packb("text"),
        msgpack.packb(ASKED.model_dump())[:-1],
        msgpack.packb(ASKED.model_dump()) + b"\0",
        b"\x81" * 5000,  # maps within maps
        b"\x91" * 60_000,  # lists within lists
        b"\xdd\xff\xff\xff\xff",  # a list of four billion
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\x80\x01",  # a map as a key
        b"\x81\xa1\xff\x01",  # no UTF-8
        bytes(range(256)),
    ],
)
def test_what_is_no_map_is_refused(payload: bytes) -> None:
    with pytest.raises(FrameError, match=r"^OPEN: "):
        parse_body(Frame(SessionKind.OPEN, body=payload), OpenPainting)


def test_bodies_over_the_limit_are_not_even_parsed() -> None:
    padded = msgpack.packb({**ASKED.model_dump(), "more": "x" * MAX_BODY})
    with pytest.raises(FrameError, match=f"at most {MAX_BODY} bytes"):
        parse_body(Frame(SessionKind.OPEN, body=padded), OpenPainting)


class Explosive:
    fired = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Explosive, "fired", True)


@pytest.mark.parametrize("tag", [0, 1, 42, 127, -1])
def test_nothing_in_a_body_is_executed(tag: int) -> None:
    bomb = pickle.dumps(Explosive())
    bare = Frame(SessionKind.OPEN, body=bomb)
    extension = msgpack.ExtType(tag, bomb) if tag >= 0 else msgpack.Timestamp(1)
    value = Frame(SessionKind.OPEN, body=msgpack.packb({**ASKED.model_dump(), "fingerprint": extension}))
    unknown = Frame(SessionKind.OPEN, body=msgpack.packb({**ASKED.model_dump(), "more": extension}))
    for frame in (bare, value):
        with pytest.raises(FrameError):
            parse_body(frame, OpenPainting)
    assert parse_body(unknown, OpenPainting) == ASKED
    assert not Explosive.fired


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_body_raises_anything_but_a_frame_error(payload: bytes) -> None:
    for schema in (OpenPainting, SessionGrant, ResumeReply, BusyReply, ErrorReply):
        with pytest.raises(FrameError):
            parse_body(Frame(SessionKind.ERROR, body=payload), schema)
