"""Channel between Ray actors: a service runs in an actor, its edges are nodes of the same cluster."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from raycloud.link.channel import Channel, LinkDown, Loopback

CALLS_AT_ONCE = 64
_CALL_S = 30.0


class ActorService:
    """Base class of an actor that serves connections of a link.

    Make it an actor with ``max_concurrency=CALLS_AT_ONCE``: every waiting call occupies a thread.

    Args:
        serve: coroutine function that handles one connection until it ends; further arguments are those of
            :meth:`connect`.
    """

    def __init__(self, serve: Callable[..., Awaitable[None]]) -> None:
        self._service = Loopback(serve)
        self._channels: dict[int, Channel] = {}
        self._numbers = itertools.count()

    def connect(self, *about: str) -> int:
        """Open a channel and return its number.

        Args:
            about: what the service must know of the peer, such as its principal.
        """
        number = next(self._numbers)
        self._channels[number] = self._service.connect(*about)
        return number

    def send(self, number: int, data: bytes) -> None:
        """Send one message."""
        self._channel(number).send(data)

    def receive(self, number: int, timeout_s: float) -> bytes:
        """Return the next message; wait at most ``timeout_s`` seconds."""
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


class ActorChannel:
    """Edge end of a channel to an :class:`ActorService`.

    A dead actor or a call without a reply raises :class:`LinkDown`.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._number: int = self._call(actor.connect.remote(), _CALL_S)

    def send(self, data: bytes) -> None:
        """Send one message."""
        self._call(self._actor.send.remote(self._number, data), _CALL_S)

    def receive(self, timeout_s: float) -> bytes:
        """Return the next message; wait at most ``timeout_s`` seconds for it."""
        waiting = self._actor.receive.remote(self._number, timeout_s)
        data: bytes = self._call(waiting, timeout_s + _CALL_S)
        return data

    def close(self) -> None:
        """Close the channel without waiting for the actor."""
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
