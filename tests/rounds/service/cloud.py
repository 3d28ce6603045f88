"""Server of rounds on a loopback, and channels to it that break."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from raycloud.link.channel import Channel, Connection, LinkDown, Loopback
from raycloud.rounds.service import DeviceMember, DeviceUpdate, RoundClient, RoundLimits, RoundServer
from raycloud.rounds.service.messages import RoundKind

WAIT_S = 120
LIMITS = RoundLimits(poll_s=0.05, lease_s=60, handshake_s=60, send_s=60)


def weights(value: float, size: int = 3) -> dict[str, Tensor]:
    return {"a": torch.full((size,), value), "b": torch.full((2, 2), 2 * value)}


def tensors(value: float, size: int = 3) -> bytes:
    return save(weights(value, size))


class Cloud:
    """Server of rounds in this process, driven as a job drives it."""

    def __init__(self, *devices: str, size: int = 3, limits: RoundLimits = LIMITS, most_samples: int = 1000) -> None:
        nbytes = sum(one.nbytes for one in weights(0.0, size).values())
        member = DeviceMember(
            '{"job": "distill"}', "{}", nbytes, {"teacher": "t"}, {"note": b"a file"}, most_samples, self._parse
        )
        self.server = RoundServer(dict.fromkeys(devices, member), limits)
        self.loopback = Loopback(self._serve)
        self.principal, self.closed = "a token", False

    @staticmethod
    def _parse(report: bytes) -> str:
        if b"?" in report:
            raise ValueError("the report is a question")
        return report.decode()

    async def _serve(self, connection: Connection) -> None:
        await self.server.serve(connection, self.principal)

    def close(self) -> None:
        if not self.closed:
            self.loopback.close()
        self.closed = True

    def begin(self, call: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(call, self.loopback.loop)

    def do(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.begin(call).result(WAIT_S)

    def train(self, device: str, attempt: int, number: int, start: dict[str, Tensor]) -> Future[DeviceUpdate | None]:
        return self.begin(self.server.train(device, attempt, number, start))

    def client(self, device: str = "shop", connect: Any = None) -> RoundClient:
        return RoundClient(connect or (lambda session: self.loopback.connect()), device, patience_s=WAIT_S)


def task(client: RoundClient, samples: int = 5) -> tuple[int, str]:
    """Ask until there is a task."""
    while (reply := client.task(samples)).state == "wait":
        pass
    assert reply.state == "train" and reply.weights is not None
    return reply.round, reply.weights.digest


class Breaking:
    """Channel that breaks once, after a number of messages sent."""

    def __init__(self, inner: Channel, left: list[int]) -> None:
        self._inner, self._left = inner, left

    def send(self, data: bytes) -> None:
        if data[5] == RoundKind.PUSH:
            self._left[0] -= 1
            if self._left[0] == 0:
                self._inner.close()
                raise LinkDown("broken by the test")
        self._inner.send(data)

    def receive(self, timeout_s: float) -> bytes:
        return self._inner.receive(timeout_s)

    def close(self) -> None:
        self._inner.close()
