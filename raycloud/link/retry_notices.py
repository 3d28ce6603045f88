"""Notices to the user that a connection failed and is attempted again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec

from raycloud.link.channel import Channel, LinkDown

P = ParamSpec("P")

EVERY_S = 15.0


def with_retry_notices(
    connect: Callable[P, Channel],
    notify: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Callable[P, Channel]:
    """Function that connects as ``connect`` does and reports failed attempts.

    The first failure after a connection is reported at once, later ones at most every 15 seconds.

    Args:
        connect: opens a channel, or raises LinkDown if another attempt may work.
        notify: called with one line per report.
        clock: monotonic clock in seconds.
    """
    failing_since: float | None = None
    told_at = 0.0

    def connecting(*args: P.args, **kwargs: P.kwargs) -> Channel:
        nonlocal failing_since, told_at
        try:
            channel = connect(*args, **kwargs)
        except LinkDown as error:
            now = clock()
            if failing_since is None:
                failing_since, told_at = now, now
                notify(f"{error}; trying again")
            elif now - told_at >= EVERY_S:
                told_at = now
                notify(f"{error}; trying again for {now - failing_since:.0f} s now")
            raise
        failing_since = None
        return channel

    return connecting
