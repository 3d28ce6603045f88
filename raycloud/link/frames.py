"""Frames: what crosses a link, one fixed header of 80 bytes and a payload of a length the header implies.

Rows travel as raw payloads, everything else as MessagePack maps with a schema. Nothing here is ever unpickled, and no
length a peer names is believed before it is checked.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, TypeVar

import google_crc32c
import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raycloud.errors import LinkError

MAGIC, VERSION = b"RCLD", 1
HEADER_BYTES = 80
MAX_FRAME = 8 * 2**20
MAX_CONTROL = 64 * 2**10

# magic, version, kind, flags, header length, codec, reserved, first, second, deadline, reserved,
# session, epoch, seq, ack, keep, pos, rows, out_rows, payload length; then CRC32C of all before and the payload.
_HEADER = struct.Struct("<4sBBHHBBHHHH16sIQQIIIII")
_CRC = struct.Struct("<I")
_SECOND_BYTES = 10
MAX_DEADLINE_S = 0xFFFF / _SECOND_BYTES


class Kind(IntEnum):
    """What a frame is."""

    OPEN = 1
    OPEN_OK = 2
    STEP = 3
    STEP_OK = 4
    REPLAY = 5
    RESUME = 6
    RESUMED = 7
    PING = 8
    BUSY = 9
    GOAWAY = 10
    CLOSE = 11
    ERROR = 12
    ASK = 13
    TABLE = 14
    TOLD = 15
    PART = 16
    FWD = 17
    FWD_OK = 18
    BWD = 19
    BWD_OK = 20
    OPT = 21
    OPT_OK = 22
    SAVE = 23
    SAVE_OK = 24
    CODE = 25
    CODE_OK = 26
    FIT = 27
    FIT_OK = 28
    ROUND = 29
    ROUND_OK = 30
    GIVE = 31
    GIVE_OK = 32
    TAKE = 33
    TAKE_OK = 34
    LEARN = 35
    LEARN_OK = 36
    JUDGE = 37
    JUDGE_OK = 38


class FrameError(LinkError):
    """Bytes that are no frame of this protocol."""


@dataclass(frozen=True)
class Frame:
    """One message. Numbers that a kind does not use are 0."""

    kind: Kind
    session: bytes = bytes(16)
    """128 random bits that the edge draws."""
    epoch: int = 0
    """+1 at each re-attachment: fences off what an older connection still sends."""
    seq: int = 0
    """Of the step; replies carry the step's."""
    ack: int = 0
    """Seq of the last reply received."""
    keep: int = 0
    """Tokens that stay valid; those behind them are forgotten first."""
    pos: int = 0
    """Token of the first row; or the size of the map that a payload of map and raw bytes begins with."""
    rows: int = 0
    out_rows: int = 0
    """How many of the last rows are to come back."""
    first: int = 0
    second: int = 0
    codec: int = 0
    deadline_s: float = 0.0
    """Seconds after which nobody waits for the reply; 0 for never. Tenths travel."""
    payload: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of the frame."""
        return HEADER_BYTES + len(self.payload)

    def pack(self) -> bytes:
        """The bytes of the frame.

        Raises:
            FrameError: a number does not fit its field, or the frame is too large.
        """
        if len(self.payload) > MAX_FRAME - HEADER_BYTES:
            raise FrameError(f"a payload of {len(self.payload)} bytes exceeds {MAX_FRAME - HEADER_BYTES}")
        tenths = min(0xFFFF, round(self.deadline_s * _SECOND_BYTES))
        try:
            head = _HEADER.pack(
                MAGIC, VERSION, self.kind, 0, HEADER_BYTES, self.codec, 0, self.first, self.second, tenths, 0,
                self.session, self.epoch, self.seq, self.ack, self.keep, self.pos, self.rows, self.out_rows,
                len(self.payload),
            )  # fmt: skip
        except struct.error as error:
            raise FrameError(f"a number does not fit the header: {error}") from error
        return head + _CRC.pack(_checksum(head, self.payload)) + self.payload


def unpack(data: bytes) -> Frame:
    """The frame that bytes are.

    Raises:
        FrameError: they are too short or too long, damaged, or of another protocol or version.
    """
    if not HEADER_BYTES <= len(data) <= MAX_FRAME:
        raise FrameError(f"a frame has {HEADER_BYTES} to {MAX_FRAME} bytes, got {len(data)}")
    head, payload = data[: HEADER_BYTES - _CRC.size], data[HEADER_BYTES:]
    (
        magic, version, kind, _, length, codec, _, first, second, tenths, _,
        session, epoch, seq, ack, keep, pos, rows, out_rows, payload_bytes,
    ) = _HEADER.unpack(head)  # fmt: skip
    if magic != MAGIC or version != VERSION or length != HEADER_BYTES:
        raise FrameError(f"not a frame of this protocol (magic {magic!r}, version {version}, header {length})")
    if payload_bytes != len(payload):
        raise FrameError(f"the header says {payload_bytes} bytes of payload, there are {len(payload)}")
    if _CRC.unpack(data[HEADER_BYTES - _CRC.size : HEADER_BYTES])[0] != _checksum(head, payload):
        raise FrameError("the checksum does not fit: the frame was damaged")
    try:
        known = Kind(kind)
    except ValueError:
        raise FrameError(f"no frame kind {kind}") from None
    deadline = tenths / _SECOND_BYTES
    return Frame(
        known, session, epoch, seq, ack, keep, pos, rows, out_rows, first, second, codec, deadline, payload
    )  # fmt: skip


def _checksum(head: bytes, payload: bytes) -> int:
    return int(google_crc32c.extend(google_crc32c.value(head), payload))


class Body(BaseModel):
    """The payload of a control frame: a MessagePack map. Keys that a later version adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def pack(self) -> bytes:
        """The bytes of the map."""
        return bytes(msgpack.packb(self.model_dump()))


B = TypeVar("B", bound=Body)


def body(frame: Frame, schema: type[B]) -> B:
    """The control body of a frame.

    Raises:
        FrameError: it is too large, no MessagePack map, or does not fit the schema.
    """
    if len(frame.payload) > MAX_CONTROL:
        raise FrameError(f"a control body has at most {MAX_CONTROL} bytes, got {len(frame.payload)}")
    try:
        found: Any = msgpack.unpackb(frame.payload)
        return schema.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise FrameError(f"{frame.kind.name}: {where}: {first['msg']}") from None
    except Exception:  # msgpack raises a family of its own and plain ValueErrors
        raise FrameError(f"{frame.kind.name}: the body is no MessagePack map") from None


def with_bytes(kind: Kind, control: Body, raw: bytes = b"", *, seq: int = 0, rows: int = 0) -> Frame:
    """A frame of a map and raw bytes behind it, such as coded rows.

    Raises:
        FrameError: the map is too large.
    """
    packed = control.pack()
    if len(packed) > MAX_CONTROL:
        raise FrameError(f"a control body has at most {MAX_CONTROL} bytes, got {len(packed)}")
    return Frame(kind, seq=seq, pos=len(packed), rows=rows, payload=packed + raw)


def split_off(frame: Frame, schema: type[B]) -> tuple[B, bytes]:
    """The map at the beginning of a frame's payload, and the raw bytes behind it.

    Raises:
        FrameError: there is no such map.
    """
    if frame.pos > len(frame.payload):
        raise FrameError(f"{frame.kind.name}: a map of {frame.pos} bytes in a payload of {len(frame.payload)}")
    return body(replace(frame, payload=frame.payload[: frame.pos]), schema), frame.payload[frame.pos :]


class Open(Body):
    """What the edge asks for."""

    fingerprint: str = Field(max_length=128)
    """Of the model both sides must hold."""
    calibration: str = Field(default="", max_length=128)
    """Fingerprint of the codecs' calibration; empty if the codec needs none."""
    codec: str = Field(max_length=32)
    firsts: list[int] = Field(min_length=1, max_length=512)
    seconds: list[int] = Field(min_length=1, max_length=512)
    max_tokens: int = Field(ge=1)


class Granted(Body):
    """What the cloud grants to any session."""

    lease_s: float = Field(gt=0)
    credit: int = Field(ge=1)
    """Requests that may be on their way at once."""
    replica: str = Field(default="", max_length=128)


class Opened(Granted):
    """What the cloud grants to a generation."""

    max_tokens: int = Field(ge=1)
    max_rows: int = Field(ge=1)


class Resumed(Body):
    """What the cloud still has of a session."""

    tokens: int = Field(default=0, ge=0)
    """Where they are what it is made of."""
    next_seq: int = Field(ge=1)


class Busy(Body):
    """Come back later; the session is untouched."""

    retry_after_s: float = Field(ge=0)


class Refusal(Body):
    """Why something was refused."""

    code: str = Field(max_length=32)
    message: str = Field(max_length=500)
    expected: int = 0
    """The seq that should have come, where that is the reason."""
