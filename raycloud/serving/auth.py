"""Authentication of requests and WebSockets, and the adapter from a WebSocket to a protocol connection."""

from __future__ import annotations

from fastapi import Request, WebSocket, WebSocketDisconnect

from raycloud.link.auth import Authenticator
from raycloud.link.channel import LinkDown

_POLICY_VIOLATION = 1008


async def principal_of(connection: Request | WebSocket, authenticator: Authenticator) -> str | None:
    """Return the principal of a request or of a WebSocket handshake; None if the token is wrong."""
    address = connection.client.host if connection.client else "an unknown address"
    return await authenticator.admit(connection.headers.get("authorization"), address)


async def admit(socket: WebSocket, authenticator: Authenticator) -> str | None:
    """Accept a WebSocket and return its principal; None if the token is wrong, which the client sees as HTTP 403."""
    principal = await principal_of(socket, authenticator)
    if principal is None:
        await socket.close(_POLICY_VIOLATION)
    else:
        await socket.accept()
    return principal


class SocketConnection:
    """Adapter from an accepted WebSocket to a connection of the link protocol."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def receive(self) -> bytes:
        """Return the next binary message.

        Raises:
            LinkDown: the edge closed the socket, or sent a text message.
        """
        try:
            return await self._socket.receive_bytes()
        except (WebSocketDisconnect, RuntimeError, KeyError):
            # KeyError: the message is a text message, which has no bytes.
            raise LinkDown("the edge closed the connection") from None

    async def send(self, data: bytes) -> None:
        """Send one binary message.

        Raises:
            LinkDown: the edge closed the socket.
        """
        try:
            await self._socket.send_bytes(data)
        except (WebSocketDisconnect, RuntimeError):
            raise LinkDown("the edge closed the connection") from None

    async def close(self, reason: str) -> None:
        """Close the socket with a reason, of which the first 100 characters are sent; does nothing if it is closed."""
        try:
            await self._socket.close(reason=reason[:100])
        except (WebSocketDisconnect, RuntimeError):
            return
