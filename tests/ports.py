"""Port for a server that binds it only later."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress


def free_port() -> int:
    """Return a port on which nobody listens.

    It is below those that the system gives to connections and to listeners without a port of their own, one of which
    might get it before the server binds it.
    """
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
            return int(probe.getsockname()[1])
