"""What a frame is answered that is not granted, or not now."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from raycloud.errors import LinkError
from raycloud.link.frames import Body, Busy, Frame, Kind, Refusal

T = TypeVar("T")


class Refused(LinkError):
    """A frame that is understood and not granted.

    Args:
        code: a word for programs.
        message: a line for people.
        expected: the seq that should have come, for the code ``gap``.
    """

    def __init__(self, code: str, message: str, expected: int = 0) -> None:
        super().__init__(message)
        self.code, self.expected = code, expected


class TooBusy(LinkError):
    """A frame that would be granted at another time.

    Args:
        retry_after_s: when to come back.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"busy for {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


def refusal(frame: Frame, error: Refused | TooBusy) -> Frame:
    """The answer to a frame that is not granted, or not now."""
    kind: Kind
    content: Body
    if isinstance(error, TooBusy):
        kind, content = Kind.BUSY, Busy(retry_after_s=error.retry_after_s)
    else:
        kind, content = Kind.ERROR, Refusal(code=error.code, message=str(error)[:500], expected=error.expected)
    return Frame(kind, frame.session, frame.epoch, frame.seq, payload=content.pack())


def ready(value: T) -> asyncio.Future[T]:
    """A future that is done already."""
    done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    done.set_result(value)
    return done
