"""The door of every application that edges connect to: who is let in, and their WebSocket as a connection."""

from __future__ import annotations

import hashlib
import os
import secrets

from fastapi import WebSocket, WebSocketDisconnect

from raycloud.errors import RecipeError
from raycloud.link.channel import LinkDown

TOKEN = "RAYCLOUD_TOKEN"
_POLICY_VIOLATION = 1008


def tokens_of(given: str | None) -> list[str]:
    """The tokens in a setting, separated by commas, or in the variable RAYCLOUD_TOKEN.

    Raises:
        RecipeError: there is none.
    """
    tokens = [token for part in (given or os.environ.get(TOKEN) or "").split(",") if (token := part.strip())]
    if not tokens:
        raise RecipeError(f"no token: set {TOKEN} or the argument token; edges must bring it")
    return tokens


class Doorkeeper:
    """Lets in whoever brings one of the tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    def principal(self, authorization: str | None) -> str | None:
        """Who an ``Authorization`` header stands for, or None; every token is compared, in constant time."""
        brought = (authorization or "").removeprefix("Bearer ").strip()
        digest = hashlib.sha256(brought.encode()).digest()
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:16] if any(matches) and brought else None

    async def admit(self, socket: WebSocket) -> str | None:
        """Accept a WebSocket; None if it was turned away before that, which its client sees as HTTP 403."""
        principal = self.principal(socket.headers.get("authorization"))
        if principal is None:
            await socket.close(_POLICY_VIOLATION)
        else:
            await socket.accept()
        return principal


class SocketConnection:
    """One accepted WebSocket as a connection of the protocol."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def receive(self) -> bytes:
        """The next binary message."""
        try:
            return await self._socket.receive_bytes()
        except (WebSocketDisconnect, RuntimeError, KeyError):
            # KeyError: a text message has no bytes.
            raise LinkDown("the edge left") from None

    async def send(self, data: bytes) -> None:
        """Send one binary message."""
        try:
            await self._socket.send_bytes(data)
        except (WebSocketDisconnect, RuntimeError):
            raise LinkDown("the edge left") from None

    async def close(self, reason: str) -> None:
        """Close the socket."""
        try:
            await self._socket.close(reason=reason[:100])
        except (WebSocketDisconnect, RuntimeError):
            return
