"""Network emulation: a link slowed to a given bandwidth and delay, to measure costs on such a network."""

from __future__ import annotations

import queue
import re
import threading
import time
from dataclasses import dataclass

from raycloud.errors import LinkError
from raycloud.link.channel import Channel, LinkDown


@dataclass(frozen=True)
class Network:
    """Network between edge and cloud: bandwidth and delay."""

    mbit_s: float = float("inf")
    """Bandwidth of each direction in Mbit/s."""
    rtt_ms: float = 0.0
    """Delay of a round trip in milliseconds, half of it each way."""

    def __post_init__(self) -> None:
        if not self.mbit_s > 0 or not self.rtt_ms >= 0:
            raise ValueError(f"a network needs mbit_s > 0 and rtt_ms >= 0, got {self.mbit_s} and {self.rtt_ms}")

    def seconds(self, size: int) -> float:
        """Seconds for which a message of ``size`` bytes occupies its direction."""
        return size * 8 / (self.mbit_s * 1e6)


_BANDWIDTHS = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}
_DELAYS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def parse_bandwidth(text: str) -> float:
    """Bandwidth in Mbit/s of a text such as ``10Mbit``, ``500kbit`` or ``1Gbit/s``.

    Raises:
        ValueError: it is no positive number with one of these units.
    """
    return _parse("bandwidth", text.removesuffix("/s"), _BANDWIDTHS, "10Mbit", least=1e-6)


def parse_delay(text: str) -> float:
    """Delay in milliseconds of a text such as ``50ms``, ``0.2s`` or ``300us``.

    Raises:
        ValueError: it is no number of 0 or more with one of these units.
    """
    return _parse("delay", text, _DELAYS, "50ms", least=0.0)


def _parse(what: str, text: str, units: dict[str, float], example: str, least: float) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    value = float(found[1]) * units[found[2]] if found and found[2] in units else -1.0
    if not least <= value < float("inf"):
        allowed = ", ".join(units)
        raise ValueError(f"'{text}' is no {what}; allowed: a number with a unit of {allowed}, such as {example}")
    return value


class _Direction:
    """Direction of a network: messages are sent one after the other and arrive half a round trip later."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._free = 0.0

    def due(self, size: int) -> float:
        self._free = max(self._free, time.monotonic()) + self._network.seconds(size)
        return self._free + self._network.rtt_ms / 2e3


class EmulatedChannel:
    """Channel over an emulated network. Senders do not wait: messages are queued as in a socket's buffers."""

    def __init__(self, inner: Channel, network: Network) -> None:
        self._inner = inner
        self._broken: LinkError | None = None
        self._up: queue.Queue[tuple[float, bytes] | None] = queue.Queue()
        self._down: queue.Queue[tuple[float, bytes] | None] = queue.Queue()
        self._next: tuple[float, bytes] | None = None
        self._directions = _Direction(network), _Direction(network)
        self._open = True
        for work in (self._push, self._pull):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def send(self, data: bytes) -> None:
        """Queue one message."""
        if self._broken is not None or not self._open:
            raise self._broken or LinkDown("the channel is closed")
        self._up.put((self._directions[0].due(len(data)), data))

    def receive(self, timeout_s: float) -> bytes:
        """Receive the next message, not before its emulated arrival time."""
        until = time.monotonic() + timeout_s
        if self._next is None:
            try:
                self._next = self._down.get(timeout=max(0.0, timeout_s))
            except queue.Empty:
                raise TimeoutError from None
            if self._next is None:
                self._down.put(None)
                raise self._broken or LinkDown("the channel is closed")
        due, data = self._next
        if due > until:
            time.sleep(max(0.0, until - time.monotonic()))
            raise TimeoutError
        time.sleep(max(0.0, due - time.monotonic()))
        self._next = None
        return data

    def close(self) -> None:
        """Close the channel at once; messages sent before are still delivered, as from a socket's buffers."""
        if self._open:
            self._open = False
            self._up.put(None)
            self._down.put(None)

    def _push(self) -> None:
        try:
            while (item := self._up.get()) is not None:
                due, data = item
                time.sleep(max(0.0, due - time.monotonic()))
                self._inner.send(data)
        except LinkError as error:
            self._broken = error
        self._inner.close()

    def _pull(self) -> None:
        while self._open:
            try:
                data = self._inner.receive(1.0)
            except TimeoutError:
                continue
            except LinkError as error:
                self._broken = error
                break
            self._down.put((self._directions[1].due(len(data)), data))
        self._down.put(None)
