"""The slowed link: order, delay and bandwidth of both directions, and how it ends."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from raycloud.errors import LinkError
from raycloud.link.channel import LinkDown
from raycloud.link.network import Network, Shaped


class Echo:
    """An inner channel that answers every message with itself, at once."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = threading.Event()
        self.broken: LinkError | None = None
        self._back: queue.Queue[bytes] = queue.Queue()

    def send(self, data: bytes) -> None:
        if self.broken is not None or self.closed.is_set():
            raise self.broken or LinkDown("closed")
        self.sent.append(data)
        self._back.put(data)

    def receive(self, timeout_s: float) -> bytes:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if self.broken is not None or self.closed.is_set():
                raise self.broken or LinkDown("closed")
            try:
                return self._back.get(timeout=0.01)
            except queue.Empty:
                continue
        raise TimeoutError

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize("wrong", [{"mbit_s": 0}, {"mbit_s": -1}, {"rtt_ms": -1}, {"mbit_s": float("nan")}])
def test_impossible_networks_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mbit_s > 0"):
        Network(**wrong)


def test_a_message_keeps_its_direction_busy_for_its_size() -> None:
    assert Network(mbit_s=8).seconds(1_000_000) == 1.0
    assert Network().seconds(10**9) == 0.0


def test_order_is_kept() -> None:
    shaped = Shaped(Echo(), Network(rtt_ms=10, mbit_s=100))
    messages = [b"%d" % number * (1 + number % 7) for number in range(60)]
    for message in messages:
        shaped.send(message)
    assert [shaped.receive(10) for _ in messages] == messages
    shaped.close()


def test_a_round_trip_takes_its_delay_and_messages_share_it() -> None:
    shaped = Shaped(Echo(), Network(rtt_ms=200))
    started = time.monotonic()
    for _ in range(5):
        shaped.send(b"x")
    assert time.monotonic() - started < 0.15
    for _ in range(5):
        shaped.receive(5)
    took = time.monotonic() - started
    shaped.close()
    assert 0.2 <= took < 0.8


def test_messages_wait_for_one_another_at_the_bandwidth() -> None:
    # 3 messages of 50 ms, up and then down again: the first comes down while the last goes up.
    shaped = Shaped(Echo(), Network(mbit_s=1))
    started = time.monotonic()
    for _ in range(3):
        shaped.send(bytes(6250))
    for _ in range(3):
        shaped.receive(5)
    took = time.monotonic() - started
    shaped.close()
    assert 0.2 <= took < 0.8


def test_waiting_ends_in_time_and_loses_nothing() -> None:
    shaped = Shaped(Echo(), Network(rtt_ms=400))
    shaped.send(b"late")
    timeouts, started = 0, time.monotonic()
    while True:
        try:
            assert shaped.receive(0.05) == b"late"
            break
        except TimeoutError:
            timeouts += 1
            assert time.monotonic() - started < 5
    shaped.close()
    assert timeouts >= 3
    assert time.monotonic() - started >= 0.4


def test_what_was_sent_before_closing_still_crosses() -> None:
    inner = Echo()
    shaped = Shaped(inner, Network(rtt_ms=1000))
    for message in (b"a", b"b"):
        shaped.send(message)
    started = time.monotonic()
    shaped.close()
    shaped.close()
    assert time.monotonic() - started < 0.4
    with pytest.raises(LinkDown):
        shaped.send(b"c")
    assert not inner.sent
    assert inner.closed.wait(5)
    assert inner.sent == [b"a", b"b"]


def test_a_waiting_receiver_learns_that_the_channel_was_closed() -> None:
    shaped = Shaped(Echo(), Network(rtt_ms=10))
    threading.Timer(0.05, shaped.close).start()
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(LinkDown):
            shaped.receive(20)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("error", [LinkDown("cut"), LinkError("text came")])
def test_a_broken_inner_channel_breaks_it_for_both_directions(error: LinkError) -> None:
    inner = Echo()
    shaped = Shaped(inner, Network(rtt_ms=2))
    shaped.send(b"x")
    assert shaped.receive(5) == b"x"
    inner.broken = error
    for _ in range(2):
        with pytest.raises(LinkError) as caught:
            shaped.receive(5)
        assert caught.value is error
    with pytest.raises(LinkError) as caught:
        shaped.send(b"y")
    assert caught.value is error
    shaped.close()
    assert inner.closed.wait(5)


def test_its_threads_end_with_it() -> None:
    before = threading.active_count()
    for _ in range(5):
        shaped = Shaped(Echo(), Network(rtt_ms=1))
        shaped.send(b"x")
        shaped.receive(5)
        shaped.close()
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before
