"""Frames: one header of 80 bytes, nothing damaged gets through, bodies are maps with a schema and run nothing."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import struct

import google_crc32c
import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.link.frames import (
    HEADER_BYTES,
    MAX_CONTROL,
    MAX_DEADLINE_S,
    MAX_FRAME,
    Busy,
    Frame,
    FrameError,
    Kind,
    Open,
    Opened,
    Refusal,
    Resumed,
    body,
    unpack,
)

ASKED = Open(fingerprint="abc", codec="float32", firsts=[2], seconds=[4], max_tokens=100)


def u(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, 2**bits - 1)


frames = st.builds(
    Frame,
    kind=st.sampled_from(Kind),
    session=st.binary(min_size=16, max_size=16),
    epoch=u(32),
    seq=u(64),
    ack=u(64),
    keep=u(32),
    pos=u(32),
    rows=u(32),
    out_rows=u(32),
    first=u(16),
    second=u(16),
    codec=u(8),
    deadline_s=st.integers(0, 0xFFFF).map(lambda tenths: tenths / 10),
    payload=st.binary(max_size=300),
)


def example(payload: bytes = b"some rows") -> Frame:
    return Frame(Kind.STEP, os.urandom(16), 3, 7, 6, 20, 20, 2, 1, 2, 4, 1, 12.5, payload)


def sealed(head: bytes, payload: bytes = b"") -> bytes:
    """A frame whose checksum fits, whatever its header says."""
    return head + struct.pack("<I", google_crc32c.extend(google_crc32c.value(head), payload)) + payload


@settings(max_examples=150, deadline=None)
@given(frames)
def test_every_field_arrives_as_it_was(frame: Frame) -> None:
    data = frame.pack()
    assert len(data) == 80 + len(frame.payload)
    assert data[HEADER_BYTES:] == frame.payload
    assert unpack(data) == frame


def test_the_header_has_80_bytes_and_begins_with_the_magic() -> None:
    data = Frame(Kind.PING).pack()
    assert HEADER_BYTES == len(data) == 80
    assert data[:4] == b"RCLD"


def test_deadlines_travel_in_tenths_and_end_at_the_most_that_fits() -> None:
    assert unpack(Frame(Kind.STEP, deadline_s=1.26).pack()).deadline_s == 1.3
    assert unpack(Frame(Kind.STEP, deadline_s=1e6).pack()).deadline_s == MAX_DEADLINE_S


def test_every_flipped_byte_is_refused() -> None:
    data = example().pack()
    for at in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            with pytest.raises(FrameError):
                unpack(bytes(damaged))


def test_every_truncation_and_every_trailing_byte_is_refused() -> None:
    data = example().pack()
    for length in range(len(data)):
        with pytest.raises(FrameError):
            unpack(data[:length])
    with pytest.raises(FrameError, match="9 bytes of payload, there are 10"):
        unpack(data + b"\0")


def test_the_largest_frame_passes_and_one_byte_more_does_not() -> None:
    largest = Frame(Kind.STEP, payload=bytes(MAX_FRAME - HEADER_BYTES))
    assert unpack(largest.pack()) == largest
    with pytest.raises(FrameError, match="exceeds"):
        dataclasses.replace(largest, payload=bytes(MAX_FRAME - HEADER_BYTES + 1)).pack()
    with pytest.raises(FrameError, match=f"80 to {MAX_FRAME} bytes"):
        unpack(bytes(MAX_FRAME + 1))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (slice(0, 4), b"HTTP", "magic b'HTTP'"),
        (slice(4, 5), b"\2", "version 2"),
        (slice(5, 6), b"\0", "no frame kind 0"),
        (slice(5, 6), b"\x63", "no frame kind 99"),
        (slice(8, 10), b"\x60\0", "header 96"),
        (slice(72, 76), b"\xff\xff\xff\xff", "4294967295 bytes of payload, there are 0"),
    ],
)
def test_wrong_fields_are_named_even_where_the_checksum_fits(at: slice, value: bytes, message: str) -> None:
    head = bytearray(Frame(Kind.PING).pack()[:76])
    head[at] = value
    with pytest.raises(FrameError, match=message):
        unpack(sealed(bytes(head)))


@pytest.mark.parametrize(
    "wrong",
    [{"rows": -1}, {"seq": 2**64}, {"epoch": 2**32}, {"first": 2**16}, {"codec": 256}, {"deadline_s": -1.0}],
)
def test_numbers_that_do_not_fit_are_not_sent(wrong: dict[str, float]) -> None:
    with pytest.raises(FrameError, match="does not fit"):
        Frame(Kind.STEP, **wrong).pack()  # type: ignore[arg-type]


def test_noise_is_no_frame() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        noise = rng.randbytes(rng.randrange(200))
        for data in (noise, b"RCLD\1\3" + noise):
            with pytest.raises(FrameError):
                unpack(data)


@pytest.mark.parametrize(
    "content",
    [
        ASKED,
        Opened(lease_s=60.0, max_tokens=9, max_rows=8, credit=4, replica="r"),
        Resumed(tokens=5, next_seq=2),
        Busy(retry_after_s=0.5),
        Refusal(code="gap", message="step 9 came", expected=3),
    ],
)
def test_bodies_arrive_as_they_were(content: Open | Opened | Resumed | Busy | Refusal) -> None:
    assert body(unpack(Frame(Kind.OPEN, payload=content.pack()).pack()), type(content)) == content


def test_keys_of_later_versions_are_ignored() -> None:
    later = msgpack.packb({**ASKED.model_dump(), "colour": "green", "adapters": [1, {"a": b"b"}]})
    assert body(Frame(Kind.OPEN, payload=later), Open) == ASKED


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": 5},
        {"fingerprint": "a" * 129},
        {"codec": None},
        {"firsts": []},
        {"firsts": "2"},
        {"firsts": [[2]]},
        {"firsts": list(range(513))},
        {"seconds": {"4": 4}},
        {"max_tokens": 0},
        {"max_tokens": float("nan")},
        {"max_tokens": "many"},
    ],
)
def test_wrong_values_are_refused_and_named(change: dict[str, object]) -> None:
    payload = msgpack.packb({**ASKED.model_dump(), **change})
    with pytest.raises(FrameError, match=f"OPEN: {next(iter(change))}") as caught:
        body(Frame(Kind.OPEN, payload=payload), Open)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1.0])
def test_no_one_is_told_to_come_back_before_now(value: float) -> None:
    with pytest.raises(FrameError, match="retry_after_s"):
        body(Frame(Kind.BUSY, payload=msgpack.packb({"retry_after_s": value})), Busy)


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
        body(Frame(Kind.OPEN, payload=payload), Open)


def test_bodies_over_the_limit_are_not_even_parsed() -> None:
    padded = msgpack.packb({**ASKED.model_dump(), "more": "x" * MAX_CONTROL})
    with pytest.raises(FrameError, match=f"at most {MAX_CONTROL} bytes"):
        body(Frame(Kind.OPEN, payload=padded), Open)


class Explosive:
    fired = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Explosive, "fired", True)


@pytest.mark.parametrize("tag", [0, 1, 42, 127, -1])
def test_nothing_in_a_body_is_executed(tag: int) -> None:
    bomb = pickle.dumps(Explosive())
    bare = Frame(Kind.OPEN, payload=bomb)
    extension = msgpack.ExtType(tag, bomb) if tag >= 0 else msgpack.Timestamp(1)
    value = Frame(Kind.OPEN, payload=msgpack.packb({**ASKED.model_dump(), "fingerprint": extension}))
    unknown = Frame(Kind.OPEN, payload=msgpack.packb({**ASKED.model_dump(), "more": extension}))
    for frame in (bare, value):
        with pytest.raises(FrameError):
            body(frame, Open)
    assert body(unknown, Open) == ASKED
    assert not Explosive.fired


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_body_raises_anything_but_a_frame_error(payload: bytes) -> None:
    for schema in (Open, Opened, Resumed, Busy, Refusal):
        with pytest.raises(FrameError):
            body(Frame(Kind.ERROR, payload=payload), schema)
