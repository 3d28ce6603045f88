"""Checks of a request before it is read: its token or its host names, its size and its time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from urllib.parse import urlsplit

import h11
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from raycloud.edge.errors import ApiError
from raycloud.link.auth import Authenticator
from raycloud.link.proxy import is_loopback


class BearerMiddleware:
    """Middleware that passes only requests with a valid bearer token; ``/healthz`` is open.

    Args:
        app: the protected application.
        authenticator: authenticator of the tokens.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app, self._authenticator = app, authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass the request on."""
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) != "/healthz":
            brought = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            address = (scope.get("client") or ("an unknown address",))[0]
            if await self._authenticator.admit(brought, address) is None:
                message = "this server needs its token: Authorization: Bearer …"
                refusal = ApiError(401, message, "authentication_error", code="invalid_api_key")
                headers = {"WWW-Authenticate": "Bearer"}
                await JSONResponse(refusal.body, refusal.status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class LocalHostMiddleware:
    """Middleware that passes only requests that name this machine; it protects a server without a token.

    A page of a foreign site can make its own name point to 127.0.0.1 (DNS rebinding) and would reach the server with
    that name as ``Host``; other pages send their name as ``Origin``.

    Args:
        app: the protected application.
        allowed: names that are accepted in addition to ``localhost`` and loopback addresses.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str] = ()) -> None:
        self._app, self._allowed = app, frozenset(name.lower() for name in allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403, or pass the request on."""
        if scope["type"] in ("http", "websocket") and (wrong := self._wrong(scope)) is not None:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": wrong})
                return
            refusal = ApiError(403, wrong, "permission_error", code="host_not_allowed")
            await JSONResponse(refusal.body, refusal.status)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _wrong(self, scope: Scope) -> str | None:
        for header, value in scope["headers"]:
            if header not in (b"host", b"origin"):
                continue
            given = value.decode("latin-1")
            name = _name(given if header == b"origin" else f"//{given}")
            if not is_loopback(name) and name not in self._allowed:
                what = "Host" if header == b"host" else "Origin"
                others = ", ".join(["localhost, 127.0.0.1, [::1]", *sorted(self._allowed)])
                return (
                    f"{what} '{given[:100]}' is not let in without a token; allowed: {others} (--allow-host adds one)"
                )
        return None


def _name(url: str) -> str:
    with suppress(ValueError):
        return urlsplit(url).hostname or ""
    return ""


async def read_body(request: Request, most: int, within_s: float) -> bytes:
    """Body of a request. A body that is too large is not kept; the rest is read and discarded, because most clients do
    not read an answer before they have sent everything.

    Raises:
        ApiError: 413 for a body that is too large, 408 for one that does not end in time.
    """
    body, fits = bytearray(), True
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            async for part in request.stream():
                fits = fits and len(body) + len(part) <= most
                if fits:
                    body += part
                else:
                    body.clear()
            if fits:
                return bytes(body)
    if fits:
        raise ApiError(408, f"the body did not come within {within_s:g} s", code="timeout")
    message = f"the body is too large: at most {most} bytes are taken, as no more fit this model's context"
    raise ApiError(413, message, code="body_too_large")


class HeaderTimeoutProtocol(H11Protocol):
    """HTTP protocol that closes a connection if the head of a request does not arrive in time."""

    within_s: float
    """Time limit in seconds from the first byte, or the start of the connection, to the end of the head."""
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first head."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Keep the timer running only while a head is incomplete."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._wait()
        else:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.within_s, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


def header_timeout_protocol(seconds: float) -> type[HeaderTimeoutProtocol]:
    """HTTP protocol class with a time limit in seconds for the head of a request."""
    return type("HeaderTimeoutProtocol", (HeaderTimeoutProtocol,), {"within_s": seconds})
