"""TCP proxy that breaks connections after a given number of bytes."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class BreakingProxy:
    """TCP relay that breaks a connection after a number of bytes, also in the middle of a message.

    Args:
        port: port on 127.0.0.1 to relay to.
    """

    def __init__(self, port: int) -> None:
        self._target, self._budgets = port, list[int]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cuts = 0
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def plan(self, budgets: list[int]) -> None:
        """Set the bytes after which each of the next connections breaks; later connections are not broken."""
        self._budgets = list(budgets)

    def close(self) -> None:
        """Stop accepting connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                budget = [self._budgets.pop(0)] if self._budgets else [-1]
                far = socket.create_connection(("127.0.0.1", self._target))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=(source, sink, budget), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, budget: list[int]) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if 0 <= budget[0] <= len(data):
                    sink.sendall(data[: budget[0]])
                    self.cuts += 1
                    break
                budget[0] -= len(data) if budget[0] > 0 else 0
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                end.close()
