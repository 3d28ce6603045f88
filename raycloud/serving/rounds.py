"""Ray Serve application by which devices without Ray take part in jobs: it relays their WebSockets to a job's actor."""

# No postponed annotations: Serve and FastAPI read those of the handlers and of the builder's argument.
import asyncio
from typing import Any

from fastapi import FastAPI, WebSocket
from pydantic import Field
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application

from raycloud.cluster.device_rounds import find_device_rounds
from raycloud.link.auth import Authenticator
from raycloud.link.channel import Connection, LinkDown
from raycloud.link.frames import FrameError, unpack
from raycloud.link.server import RequestRefused
from raycloud.link.server.replies import error_frame
from raycloud.link.websocket import JOB_HEADER
from raycloud.rounds.service.messages import RoundKind
from raycloud.serving.auth import SocketConnection, admit
from raycloud.serving.replicas import ReplicaSettings, new_api, replicated_app

_IDLE_SOCKETS = 64
_RECEIVE_S = 20.0
_HANDSHAKE_S = 20.0


class RoundsSettings(ReplicaSettings):
    """Arguments of the application: ``key=value`` on the command line, ``args`` in a config file."""

    num_cpus: float = Field(0.1, ge=0)
    devices: int = Field(64, ge=1)
    """Devices that a replica serves at once; each has one socket for rounds, and one for signals or for training."""


async def relay(connection: Connection, actor: Any, principal: str, service: str) -> None:
    """Pass messages between a device and the actor of a job until either ends.

    Args:
        connection: connection to the device.
        actor: handle of the actor, a :class:`~raycloud.cluster.actor_channel.ActorService`.
        principal: principal of the device, from its credentials.
        service: ``rounds``, ``signals`` or ``split-tune``.
    """
    number: int | None = None

    async def up() -> None:
        while True:
            await actor.send.remote(number, await connection.receive())

    async def down() -> None:
        while True:
            try:
                await connection.send(await actor.receive.remote(number, _RECEIVE_S))
            except RayTaskError as error:
                if not isinstance(error.cause, TimeoutError):
                    raise

    reason = "the job's actor closed the connection"
    try:
        number = await actor.connect.remote(principal, service)
        both = [asyncio.create_task(up()), asyncio.create_task(down())]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
    except RayError:
        reason = "the job's actor does not answer"
    if number is not None:
        actor.close.remote(number)
    await connection.close(reason)


async def refuse(connection: Connection, message: str) -> None:
    """Answer the first message of a device with a refusal, and close its connection."""
    try:
        async with asyncio.timeout(_HANDSHAKE_S):
            frame = unpack(await connection.receive(), RoundKind)
            await connection.send(error_frame(frame, RequestRefused("job", message)).pack())
    except (FrameError, LinkDown, TimeoutError):
        pass
    await connection.close(message)


def build_api(authenticator: Authenticator) -> FastAPI:
    """Make the WebSocket API of one replica."""

    async def leave() -> None:
        """Do nothing: sockets end with the replica, and the sessions go on at another one."""

    api = new_api("raycloud rounds", leave)

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok"}

    async def serve(socket: WebSocket, service: str) -> None:
        principal = await admit(socket, authenticator)
        if principal is None:
            return
        job, connection = socket.headers.get(JOB_HEADER, ""), SocketConnection(socket)
        actor = await asyncio.to_thread(find_device_rounds, job)
        if actor is None:
            await refuse(connection, f"no job '{job[:100]}' takes devices here now; a job is named like its output")
        else:
            await relay(connection, actor, principal, service)

    @api.websocket("/v1/rounds")
    async def rounds(socket: WebSocket) -> None:
        await serve(socket, "rounds")

    @api.websocket("/v1/rounds/signals")
    async def signals(socket: WebSocket) -> None:
        await serve(socket, "signals")

    @api.websocket("/v1/rounds/split-tune")
    async def split_tune(socket: WebSocket) -> None:
        await serve(socket, "split-tune")

    return api


def app(settings: RoundsSettings) -> Application:
    """Build the application; it holds no state and serves all jobs of the cluster.

    Raises:
        RecipeError: no token is given. The proxy's host is not known here, so no token is never allowed.
    """
    tokens = settings.tokens

    def build() -> FastAPI:
        return build_api(Authenticator(tokens))

    return replicated_app("rounds", build, settings, edges=2 * settings.devices, idle=_IDLE_SOCKETS)
