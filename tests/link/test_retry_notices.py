"""Messages while nothing answers at an address."""

from __future__ import annotations

import socket
from functools import partial

import pytest

from raycloud.errors import LinkError
from raycloud.link.channel import LinkDown
from raycloud.link.retry_notices import with_retry_notices
from raycloud.link.websocket import WebSocketChannel


def test_the_first_failure_is_told_at_once_and_later_ones_now_and_then() -> None:
    told, now, up = list[str](), [0.0], [False]

    def connect(session: str) -> str:
        if not up[0]:
            raise LinkDown("nobody listens at wss://cloud")
        return session

    again = with_retry_notices(connect, told.append, clock=lambda: now[0])  # type: ignore[arg-type]  # no channel is needed
    for seconds in (0, 1, 14, 16, 20, 33):
        now[0] = seconds
        with pytest.raises(LinkDown):
            again("s")
    assert told == [
        "nobody listens at wss://cloud; trying again",
        "nobody listens at wss://cloud; trying again for 16 s now",
        "nobody listens at wss://cloud; trying again for 33 s now",
    ]
    up[0] = True
    assert again("s") == "s"
    up[0] = False
    with pytest.raises(LinkDown):
        again("s")
    assert told[-1] == "nobody listens at wss://cloud; trying again"


def test_an_address_where_nobody_listens_is_named() -> None:
    with socket.socket() as taken:  # bound, and not listening: nobody else can take the port meanwhile
        taken.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{taken.getsockname()[1]}/v1/signals"
        with pytest.raises(LinkError, match=f"nobody listens at {url}"):
            partial(WebSocketChannel, url)()
