"""Replies to frames that are refused, or not accepted at present."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from raycloud.errors import LinkError
from raycloud.link.frames import Body, BusyReply, ErrorReply, Frame, SessionKind

T = TypeVar("T")


class RequestRefused(LinkError):
    """Error of a valid frame whose request is refused.

    Args:
        code: error code for programs.
        message: one line for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ServerBusy(LinkError):
    """Error of a frame whose request may be accepted later.

    Args:
        retry_after_s: seconds after which to repeat the request.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"busy for {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


def error_frame(frame: Frame, error: RequestRefused | ServerBusy) -> Frame:
    """Reply to a frame that is refused (ERROR), or not accepted at present (BUSY)."""
    kind: SessionKind
    content: Body
    if isinstance(error, ServerBusy):
        kind, content = SessionKind.BUSY, BusyReply(retry_after_s=error.retry_after_s)
    else:
        kind, content = SessionKind.ERROR, ErrorReply(code=error.code, message=str(error)[:500])
    return Frame(kind, frame.session, frame.epoch, frame.seq, body=content.pack())


def completed(value: T) -> asyncio.Future[T]:
    """Future that is already done."""
    done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    done.set_result(value)
    return done
