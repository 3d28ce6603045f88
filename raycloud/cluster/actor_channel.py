"""A channel between Ray actors: the middle of a split model in an actor, for edges that are nodes of the cluster."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from raycloud.link.channel import Channel, Connection, LinkDown, Loopback
from raycloud.models.loading import Device, DType
from raycloud.split.cloud.engine import Engine
from raycloud.split.cloud.host import Host
from raycloud.split.cloud.limits import Limits
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet
from raycloud.split.terms import Calibrated, Codecs

CALLS_AT_ONCE = 64
_CALL_S = 30.0


class ActorService:
    """A service on a link, as an actor: a base class.

    Args:
        serve: handles one connection until it ends.
    """

    def __init__(self, serve: Callable[[Connection], Awaitable[None]]) -> None:
        self._service = Loopback(serve)
        self._channels: dict[int, Channel] = {}
        self._numbers = itertools.count()

    def connect(self) -> int:
        """Open a channel; its number."""
        number = next(self._numbers)
        self._channels[number] = self._service.connect()
        return number

    def send(self, number: int, data: bytes) -> None:
        """Hand one message over."""
        self._channel(number).send(data)

    def receive(self, number: int, timeout_s: float) -> bytes:
        """The next message."""
        return self._channel(number).receive(timeout_s)

    def close(self, number: int) -> None:
        """Close a channel."""
        channel = self._channels.pop(number, None)
        if channel is not None:
            channel.close()

    def _channel(self, number: int) -> Channel:
        if number not in self._channels:
            raise LinkDown("the channel is closed")
        return self._channels[number]


class CloudSegment(ActorService):
    """The cloud's part of a model. Make it an actor with ``max_concurrency=CALLS_AT_ONCE``: waiting calls hold threads.

    Args:
        model: a whole model or an exported ``cloud`` directory.
        plans: where it is cut; None for as exported.
        limits: what is granted.
        calibration: of the codecs; None offers casts only.
        device: where the blocks go.
        dtype: their parameters' type.
        threads: of torch.
    """

    def __init__(
        self,
        model: str,
        plans: PlanSet | None = None,
        *,
        limits: Limits | None = None,
        calibration: Calibrated | None = None,
        device: Device = "auto",
        dtype: DType = "auto",
        threads: int = 1,
    ) -> None:
        torch.set_num_threads(threads)
        part = load_cloud(model, plans, device=device, dtype=dtype)
        self._engine = Engine(part, threads=threads)
        host = Host(self._engine, Codecs(part.config.hidden_size, calibration), limits)
        # Who may call an actor is inside the cluster's trust already.
        super().__init__(partial(host.serve, principal="cluster"))


class ActorChannel:
    """The edge's end of a channel to an :class:`ActorService`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._number: int = self._call(actor.connect.remote(), _CALL_S)

    def send(self, data: bytes) -> None:
        """Hand one message over."""
        self._call(self._actor.send.remote(self._number, data), _CALL_S)

    def receive(self, timeout_s: float) -> bytes:
        """The next message."""
        waiting = self._actor.receive.remote(self._number, timeout_s)
        data: bytes = self._call(waiting, timeout_s + _CALL_S)
        return data

    def close(self) -> None:
        """Close it, without waiting."""
        self._actor.close.remote(self._number)

    @staticmethod
    def _call(reference: Any, timeout_s: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except (RayActorError, GetTimeoutError) as error:
            raise LinkDown(f"the cloud's actor is gone: {type(error).__name__}") from None
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, (TimeoutError, LinkDown)):
                raise type(cause)(str(cause)) from None
            raise
