"""Emulated network: order, delay and bandwidth in both directions, and close."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest

from raycloud.errors import LinkError
from raycloud.link.channel import LinkDown
from raycloud.link.network import EmulatedChannel, Network, parse_bandwidth, parse_delay
from tests.clock import Clock


class Echo:
    """Inner channel that echoes every message at once."""

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Fake time of the link, which passes while the test's thread sleeps or waits for a message."""
    with Clock(one_thread=True).running() as made:
        monkeypatch.setattr("raycloud.link.network.time", made)
        yield made


@pytest.mark.parametrize("wrong", [{"mbit_s": 0}, {"mbit_s": -1}, {"rtt_ms": -1}, {"mbit_s": float("nan")}])
def test_impossible_networks_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mbit_s > 0"):
        Network(**wrong)


@pytest.mark.parametrize(("text", "mbit_s"), [("10Mbit", 10), ("2.5 mbit/s", 2.5), ("500kbit", 0.5), ("1Gbit/s", 1000)])
def test_bandwidths_have_units(text: str, mbit_s: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(mbit_s)


@pytest.mark.parametrize(("text", "ms"), [("50ms", 50), ("0.2s", 200), ("300 us", 0.3), ("0ms", 0)])
def test_delays_have_units(text: str, ms: float) -> None:
    assert parse_delay(text) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "10", "ten Mbit", "10MB", "-1Mbit", "0Mbit", "10Mbit 5"])
def test_other_bandwidths_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no bandwidth; allowed: .*such as 10Mbit"):
        parse_bandwidth(text)


@pytest.mark.parametrize("text", ["50", "50min", "-1ms", "50ms,"])
def test_other_delays_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no delay; allowed: .*such as 50ms"):
        parse_delay(text)


def test_a_message_keeps_its_direction_busy_for_its_size() -> None:
    assert Network(mbit_s=8).seconds(1_000_000) == 1.0
    assert Network().seconds(10**9) == 0.0


@pytest.mark.waits
def test_order_is_kept() -> None:
    shaped = EmulatedChannel(Echo(), Network(rtt_ms=10, mbit_s=100))
    messages = [b"%d" % number * (1 + number % 7) for number in range(60)]
    for message in messages:
        shaped.send(message)
    assert [shaped.receive(60) for _ in messages] == messages
    shaped.close()


@pytest.mark.waits
def test_a_round_trip_takes_its_delay_and_messages_share_it(clock: Clock) -> None:
    inner = Echo()
    shaped = EmulatedChannel(inner, Network(rtt_ms=200))
    for _ in range(5):
        shaped.send(b"x")
    assert (clock.now, inner.sent) == (0, [])
    clock.sleep(0.1)
    # Time passes only once all of them are on their way back.
    until = time.monotonic() + 60
    while shaped._down.qsize() < 5 and time.monotonic() < until:
        time.sleep(0.001)
    for _ in range(5):
        shaped.receive(60)
    shaped.close()
    assert clock.now == pytest.approx(0.2)


@pytest.mark.waits
def test_messages_wait_for_one_another_at_the_bandwidth(clock: Clock) -> None:
    # 3 messages of 50 ms, up and then down again: the first comes down while the second goes up.
    shaped = EmulatedChannel(Echo(), Network(mbit_s=1))
    for _ in range(3):
        shaped.send(bytes(6250))
    clock.sleep(0.05)
    for number in range(3):
        shaped.receive(60)
        assert clock.now == pytest.approx(0.1 + number * 0.05)
    shaped.close()


@pytest.mark.waits
def test_waiting_ends_in_time_and_loses_nothing(clock: Clock) -> None:
    shaped = EmulatedChannel(Echo(), Network(rtt_ms=400))
    shaped.send(b"late")
    for _ in range(2):
        with pytest.raises(TimeoutError):
            shaped.receive(0.01)
    clock.sleep(0.2)
    found: list[bytes] = []
    while not found:
        try:
            found.append(shaped.receive(0.05))
        except TimeoutError:
            assert clock.now < 0.41
    shaped.close()
    assert (found, clock.now) == ([b"late"], pytest.approx(0.4))


@pytest.mark.waits
def test_what_was_sent_before_closing_still_crosses(clock: Clock) -> None:
    inner = Echo()
    shaped = EmulatedChannel(inner, Network(rtt_ms=1000))
    for message in (b"a", b"b"):
        shaped.send(message)
    shaped.close()
    shaped.close()
    with pytest.raises(LinkDown):
        shaped.send(b"c")
    assert not inner.sent
    clock.sleep(0.5)
    assert inner.closed.wait(60)
    assert inner.sent == [b"a", b"b"]


@pytest.mark.waits
def test_a_waiting_receiver_learns_that_the_channel_was_closed() -> None:
    shaped = EmulatedChannel(Echo(), Network(rtt_ms=10))
    threading.Timer(0.05, shaped.close).start()
    for _ in range(2):
        with pytest.raises(LinkDown):
            shaped.receive(240)


@pytest.mark.parametrize("error", [LinkDown("cut"), LinkError("text came")])
def test_a_broken_inner_channel_breaks_it_for_both_directions(error: LinkError) -> None:
    inner = Echo()
    shaped = EmulatedChannel(inner, Network(rtt_ms=2))
    shaped.send(b"x")
    assert shaped.receive(60) == b"x"
    inner.broken = error
    for _ in range(2):
        with pytest.raises(LinkError) as caught:
            shaped.receive(60)
        assert caught.value is error
    with pytest.raises(LinkError) as caught:
        shaped.send(b"y")
    assert caught.value is error
    shaped.close()
    assert inner.closed.wait(60)


@pytest.mark.waits
def test_its_threads_end_with_it() -> None:
    before = threading.active_count()
    for _ in range(5):
        shaped = EmulatedChannel(Echo(), Network(rtt_ms=1))
        shaped.send(b"x")
        shaped.receive(60)
        shaped.close()
    until = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before
