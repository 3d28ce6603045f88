"""Rounds over a link: contributions count once, late and wrong ones are refused, devices come back."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from raycloud.errors import LinkError
from raycloud.link.channel import Channel
from raycloud.link.client import SessionRefused
from raycloud.link.frames import PIECE_BYTES
from raycloud.rounds.service import DeviceGone, RoundClient, RoundServer
from raycloud.rounds.service.messages import Blob, RoundKind, TaskReply
from tests.rounds.service.cloud import LIMITS, WAIT_S, Breaking, Cloud, task, tensors, weights

Make = Callable[..., Cloud]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Cloud] = []

    def cloud(*devices: str, **options: Any) -> Cloud:
        made.append(Cloud(*(devices or ("shop",)), **options))
        return made[-1]

    yield cloud
    for one in made:
        one.close()


def test_a_round_of_one_device(make: Make) -> None:
    cloud = make()
    ready = cloud.begin(cloud.server.prepare("shop"))
    client = cloud.client()
    assert (client.granted.recipe, client.granted.facts) == ('{"job": "distill"}', {"teacher": "t"})
    assert client.granted.weights_bytes == 28 and client.pull(client.granted.blobs["note"]) == b"a file"
    assert client.task(5) == TaskReply(state="wait")
    assert ready.result(WAIT_S) == 5
    update = cloud.train("shop", 1, 0, weights(1.0))
    number, digest = task(client)
    pulled = client.pull(Blob(digest=digest, nbytes=len(tensors(1.0))))
    assert number == 0 and pulled is not None and load(pulled)["b"].tolist() == [[2.0, 2.0]] * 2
    assert client.heartbeat(0, digest, 3, 1.5, 20.0, 7)
    assert client.push(0, digest, 11, b"report", tensors(2.0)).accepted
    done = update.result(WAIT_S)
    assert done is not None and (done.samples, done.report) == (11, "report")
    assert torch.equal(done.weights["a"], torch.full((3,), 2.0))
    assert client.task(5).state == "wait" and not client.heartbeat(0, digest, 3, 1.5, 20.0, 7)
    finishing = cloud.begin(cloud.server.finish({"shop": weights(9.0)}, WAIT_S))
    while (last := client.task(5)).state == "wait":
        pass
    assert last.state == "finished" and last.weights is not None
    assert client.pull(last.weights) == tensors(9.0)
    client.close()
    finishing.result(WAIT_S)


def test_a_contribution_counts_once_however_often_it_is_sent(make: Make) -> None:
    cloud = make()
    client = cloud.client()
    client.task(5)
    update = cloud.train("shop", 1, 0, weights(1.0))
    _, digest = task(client)
    assert [client.push(0, digest, 3, b"", tensors(2.0)).accepted for _ in range(3)] == [True] * 3
    other = client.push(0, digest, 3, b"", tensors(3.0))
    assert (other.accepted, other.reason, other.detail) == (False, "repeated", "'shop' has contributed to round 0")
    assert float(update.result(WAIT_S).weights["a"][0]) == 2.0  # type: ignore[union-attr]
    # A device whose answer was lost asks again after the round.
    cloud.train("shop", 2, 1, weights(4.0))
    task(client)
    assert client.push(0, digest, 3, b"", tensors(2.0)).accepted
    assert client.push(0, digest, 3, b"", tensors(3.0)).reason == "closed"


def test_a_contribution_goes_on_where_its_connection_broke(make: Make) -> None:
    size = 3 * PIECE_BYTES // 4
    cloud, left, sent = make(size=size), [3], []

    class Counting(Breaking):
        def send(self, data: bytes) -> None:
            super().send(data)
            if data[5] == RoundKind.PUSH:
                sent.append(len(data))

    client = cloud.client(connect=lambda session: Counting(cloud.loopback.connect(), left))
    client.task(5)
    update = cloud.train("shop", 1, 0, weights(1.0, size))
    _, digest = task(client)
    assert client.push(0, digest, 3, b"ok", tensors(2.0, size)).accepted
    done = update.result(WAIT_S)
    assert done is not None and torch.equal(done.weights["a"], torch.full((size,), 2.0))
    assert left[0] < 0 and len(sent) < 6  # the two pieces that had arrived were not sent again


def test_wrong_contributions_are_refused_with_the_reason(make: Make) -> None:
    cloud = make(most_samples=100)
    client = cloud.client()
    client.task(5)
    assert client.push(0, "0" * 64, 3, b"", tensors(2.0)).detail == "the contribution is for round 0, no round is open"
    cloud.train("shop", 1, 3, weights(1.0))
    _, digest = task(client)
    wild = save({"a": torch.full((3,), float("nan")), "b": torch.ones(2, 2)})
    for number, start, samples, report, content, reason in (
        (2, digest, 3, b"", tensors(2.0), "closed"),
        (4, digest, 3, b"", tensors(2.0), "wrong_round"),
        (3, "0" * 64, 3, b"", tensors(2.0), "wrong_round"),
        (3, digest, 0, b"", tensors(2.0), "no_samples"),
        (3, digest, 101, b"", tensors(2.0), "no_samples"),
        (3, digest, 3, b"what?", tensors(2.0), "unreadable"),
        (3, digest, 3, b"", b"no tensors", "unreadable"),
        (3, digest, 3, b"", save({"a": torch.ones(3)}), "different_tensors"),
        (3, digest, 3, b"", tensors(2.0, size=4), "different_tensors"),
        (3, digest, 3, b"", save({"a": torch.ones(3).half(), "b": torch.ones(2, 2)}), "different_tensors"),
        (3, digest, 3, b"", wild, "not_finite"),
    ):
        reply = client.push(number, start, samples, report, content)
        assert (reply.accepted, reply.reason) == (False, reason) and len(reply.detail.splitlines()) == 1
    assert client.push(3, digest, 3, b"", tensors(2.0)).accepted  # no refusal does harm


def test_a_contribution_that_is_too_large_is_refused_unread(make: Make) -> None:
    cloud = make()
    client = cloud.client()
    client.task(5)
    cloud.train("shop", 1, 0, weights(1.0))
    _, digest = task(client)
    with pytest.raises(LinkError, match=r"PUSH: \d+ raw bytes; allowed: 2097180"):
        client.push(0, digest, 3, b"", tensors(2.0, size=2**20))


def test_a_late_contribution_is_refused_and_counts_if_the_round_is_repeated(make: Make) -> None:
    cloud = make()
    client = cloud.client()
    client.task(5)
    first = cloud.train("shop", 1, 0, weights(1.0))
    _, digest = task(client)
    cloud.do(cloud.server.advance("shop", 2))
    assert first.result(WAIT_S) is None
    assert client.task(5).state == "wait" and not client.heartbeat(0, digest, 3, 1.5, 20.0, 7)
    late = client.push(0, digest, 3, b"", tensors(2.0))
    assert (late.reason, late.detail) == ("closed", "round 0 is closed")
    second = cloud.train("shop", 2, 0, weights(1.0))
    assert task(client) == (0, digest)
    assert client.push(0, digest, 3, b"", tensors(2.0)).accepted and second.result(WAIT_S) is not None


def test_a_device_that_was_killed_comes_back_into_the_same_round(make: Make) -> None:
    cloud = make()
    killed = cloud.client()
    killed.task(5)
    update = cloud.train("shop", 1, 0, weights(1.0))
    _, digest = task(killed)
    back = cloud.client()  # without a farewell of the first one
    assert task(back) == (0, digest)
    assert back.push(0, digest, 3, b"", tensors(2.0)).accepted and update.result(WAIT_S) is not None
    with pytest.raises(SessionRefused, match="another process takes part as 'shop'"):
        killed.task(5)


def test_a_device_of_which_nothing_is_heard_is_gone_and_may_come_back(make: Make) -> None:
    cloud = make(limits=LIMITS.model_copy(update={"lease_s": 0.5}))
    client = cloud.client()
    client.task(5)
    update = cloud.train("shop", 1, 0, weights(1.0))
    task(client)
    with pytest.raises(DeviceGone, match=r"nothing was heard of the device 'shop' for 0\.5 s"):
        update.result(WAIT_S)
    with pytest.raises(DeviceGone, match="the device 'shop' is not there"):
        cloud.train("shop", 2, 0, weights(1.0)).result(WAIT_S)
    ready = cloud.begin(cloud.server.prepare("shop"))
    assert client.task(6).state == "wait"  # the client opens a new session by itself
    assert ready.result(WAIT_S) == 6


def test_a_device_that_leaves_is_gone_at_once(make: Make) -> None:
    cloud = make()
    client = cloud.client()
    client.task(5)
    update = cloud.train("shop", 1, 0, weights(1.0))
    task(client)
    client.close()
    with pytest.raises(DeviceGone):
        update.result(WAIT_S)


def test_only_devices_of_the_job_take_part_and_each_with_its_token(make: Make) -> None:
    cloud = make("shop", "mill")
    with pytest.raises(SessionRefused, match="no device 'bakery' takes part in this job; allowed: shop, mill"):
        cloud.client("bakery")
    cloud.client("shop").close()
    cloud.principal = "another token"
    with pytest.raises(SessionRefused, match="the device 'shop' takes part with another token"):
        cloud.client("shop")
    cloud.client("mill").close()


def test_a_server_that_lost_everything_is_told_again(make: Make) -> None:
    clouds = [make(), make()]

    def connect(session: str) -> Channel:
        return clouds[0].loopback.connect()

    client = RoundClient(connect, "shop", patience_s=WAIT_S)
    client.task(5)
    clouds.pop(0).close()
    ready = clouds[0].begin(clouds[0].server.prepare("shop"))
    assert client.task(5).state == "wait" and ready.result(WAIT_S) == 5


def test_bytes_that_are_not_those_announced_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud = make()
    client = cloud.client()
    note = client.granted.blobs["note"]
    assert client.pull(Blob(digest=hashlib.sha256(b"other").hexdigest(), nbytes=5)) is None
    pull = RoundServer._pull

    def damaged(*arguments: Any) -> Any:
        reply = pull(*arguments)
        return replace(reply, raw=reply.raw[::-1])

    monkeypatch.setattr(RoundServer, "_pull", damaged)
    with pytest.raises(LinkError, match="the cloud sent other bytes than it had announced"):
        client.pull(note)


def test_several_devices_train_at_once(make: Make) -> None:
    cloud = make("shop", "mill")
    clients = {name: cloud.client(name) for name in ("shop", "mill")}
    for client in clients.values():
        client.task(5)
    updates = {name: cloud.train(name, 1, 0, weights(1.0)) for name in clients}
    for value, (name, client) in enumerate(clients.items(), 2):
        _, digest = task(client)
        assert client.push(0, digest, 3, b"", tensors(float(value))).accepted, name
    assert [float(update.result(WAIT_S).weights["a"][0]) for update in updates.values()] == [2.0, 3.0]  # type: ignore[union-attr]


def test_the_wait_for_the_last_farewell_ends(make: Make) -> None:
    cloud = make()
    cloud.client().task(5)
    cloud.do(asyncio.wait_for(cloud.server.finish({"shop": weights(1.0)}, 0.01), WAIT_S))
