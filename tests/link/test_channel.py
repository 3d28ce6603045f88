"""Channels within a process: order, close, timeouts, and the meter's counts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from raycloud.link.channel import Channel, Connection, LinkDown, Loopback, MeteredChannel
from raycloud.link.meter import Meter


class Service:
    """Echo every message, and record how the connections ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.all_ended = threading.Event()

    async def serve(self, connection: Connection) -> None:
        try:
            while (data := await connection.receive()) != b"leave":
                await connection.send(data)
        except LinkDown as error:
            self.ended.append(str(error))
        finally:
            self.all_ended.set()


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def loopback(service: Service) -> Iterator[Loopback]:
    made = Loopback(service.serve)
    yield made
    made.close()


def test_messages_arrive_in_order_on_each_channel(loopback: Loopback) -> None:
    channels = [loopback.connect() for _ in range(3)]
    for number in range(50):
        for name, channel in enumerate(channels):
            channel.send(b"%d:%d" % (name, number))
    for name, channel in enumerate(channels):
        assert [channel.receive(60) for _ in range(50)] == [b"%d:%d" % (name, number) for number in range(50)]


@pytest.mark.waits
def test_waiting_ends_in_time(loopback: Loopback) -> None:
    channel = loopback.connect()
    for timeout in (0.05, 0.0, -1.0):
        with pytest.raises(TimeoutError):
            channel.receive(timeout)
    channel.send(b"still works")
    assert channel.receive(60) == b"still works"


def test_closing_ends_both_sides_and_may_be_repeated(loopback: Loopback, service: Service) -> None:
    channel = loopback.connect()
    channel.send(b"x")
    assert channel.receive(60) == b"x"
    channel.close()
    channel.close()
    assert service.all_ended.wait(60)
    assert service.ended == ["the peer closed the channel"]
    with pytest.raises(LinkDown):
        channel.send(b"x")
    for _ in range(2):
        with pytest.raises(LinkDown):
            channel.receive(60)


def test_what_was_sent_before_closing_is_still_read(loopback: Loopback, service: Service) -> None:
    channel = loopback.connect()
    channel.send(b"leave")
    channel.close()
    assert service.all_ended.wait(60)
    assert service.ended == []


def test_replies_before_the_service_left_are_still_read(loopback: Loopback) -> None:
    channel = loopback.connect()
    channel.send(b"last")
    channel.send(b"leave")
    assert channel.receive(60) == b"last"
    for _ in range(2):
        with pytest.raises(LinkDown):
            channel.receive(60)
    with pytest.raises(LinkDown):
        channel.send(b"more")


@pytest.mark.waits
def test_a_waiting_receiver_learns_that_its_channel_was_closed(loopback: Loopback) -> None:
    channel = loopback.connect()
    threading.Timer(0.05, channel.close).start()
    with pytest.raises(LinkDown):
        channel.receive(240)


def test_the_end_of_the_service_ends_its_channels() -> None:
    loopback = Loopback(Service().serve)
    channel = loopback.connect()
    loopback.close()
    with pytest.raises(LinkDown):
        channel.receive(60)
    with pytest.raises(LinkDown):
        channel.send(b"x")
    channel.close()


def test_a_failing_service_closes_its_channel() -> None:
    async def fail(connection: Connection) -> None:
        await asyncio.sleep(0)
        raise RuntimeError("broken")

    loopback = Loopback(fail)
    with pytest.raises(LinkDown):
        loopback.connect().receive(60)
    loopback.close()


def test_a_meter_counts_whole_messages_each_way(loopback: Loopback) -> None:
    meter = Meter()
    channel: Channel = MeteredChannel(loopback.connect(), meter)
    for size in (1, 20, 300):
        channel.send(bytes(size))
    for size in (1, 20):
        assert channel.receive(60) == bytes(size)
    assert meter.payload == {"up": 321, "down": 21}
    assert meter.messages == {"up": 3, "down": 2}
    assert channel.receive(60) == bytes(300)
    with pytest.raises(TimeoutError):
        channel.receive(0)
    channel.close()
    with pytest.raises(LinkDown):
        channel.receive(60)
    assert meter.payload["down"] == 321
    assert meter.messages["down"] == 3


def test_who_connects_to_a_service_that_has_stopped_is_told() -> None:
    loopback = Loopback(Service().serve)
    loopback.close()
    with pytest.raises(LinkDown, match="the service has stopped"):
        loopback.connect()
