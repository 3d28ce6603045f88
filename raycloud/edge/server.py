"""An OpenAI-compatible HTTP server over anything that writes text: a whole model, or one cut between edge and cloud."""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from raycloud.edge.openai import (
    Answer,
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionRequest,
    TextAnswer,
    listed,
    usage,
)
from raycloud.edge.workers import Busy, Generation, Stopping, Workers
from raycloud.errors import LinkError, ModelError, RaycloudError
from raycloud.link.meter import Meter
from raycloud.models.text import Piece, TextModel

_LOG = logging.getLogger(__name__)
_GRACE_S = 5


def create_app(
    model: TextModel,
    name: str,
    *,
    token: str | None = None,
    meter: Meter | None = None,
    concurrency: int = 4,
    waiting: int = 32,
) -> FastAPI:
    """The application: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models`` and ``/healthz``.

    Args:
        model: what writes.
        name: what clients call it.
        token: what they must bring as ``Authorization: Bearer``; none if None.
        meter: of the link to the cloud, shown by ``/healthz``.
        concurrency: generations at once.
        waiting: requests that may wait for their turn; more are answered 429.
    """
    workers = Workers(concurrency, waiting)
    desk = _Desk(model, name, workers)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        workers.close()

    app = FastAPI(title="raycloud", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.workers = workers
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)
    if token is not None:
        app.add_middleware(Bearer, token=token)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        link = {} if meter is None else {"link": {"bytes": dict(meter.payload), "messages": dict(meter.messages)}}
        return {"status": "ok", "model": name, "active": workers.active, **link}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [listed(name, created)]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        desk.check_name(wanted)
        return listed(name, created)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        desk.check_name(asked.model)
        try:
            prompt = model.chat_prompt([message.model_dump() for message in asked.messages])
        except ModelError as error:
            raise ApiError(400, str(error), param="messages") from error
        return await desk.answer(asked, asked.limit, prompt, "messages", ChatAnswer(name), request)

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        desk.check_name(asked.model)
        return await desk.answer(asked, asked.limit, model.prompt(asked.prompt), "prompt", TextAnswer(name), request)

    return app


@dataclass(frozen=True)
class _Desk:
    """Takes a checked request to a worker and brings the answer back."""

    model: TextModel
    name: str
    workers: Workers

    def check_name(self, wanted: str) -> None:
        if wanted != self.name:
            message = f"the model '{wanted}' does not exist; this server has '{self.name}'"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def answer(
        self,
        asked: ChatRequest | CompletionRequest,
        limit: int | None,
        prompt: list[int],
        param: str,
        answer: Answer,
        request: Request,
    ) -> Response:
        room = self.model.source.max_length - len(prompt)
        if not prompt:
            raise ApiError(400, f"{param} holds no token to go on from", param=param)
        if room < 1:
            message = f"this model's context is {room + len(prompt)} tokens, {param} resulted in {len(prompt)} tokens"
            message += ", which leaves no room for an answer"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        try:
            generation = self.workers.start(
                self.model.pieces(prompt, room if limit is None else min(limit, room), asked.sampling(), asked.stop)
            )
        except Busy:
            raise ApiError(429, "too many requests wait already; try again", "rate_limit_error", code="busy") from None
        try:
            if not asked.stream:
                return await _at_once(generation, answer, len(prompt), request)
            # What goes wrong before the first token still gets a status of its own.
            first = await anext(generation)
        except BaseException as error:
            generation.cancel()
            if isinstance(error, Exception):
                raise _shaped(error) from error
            raise
        return _EventStream(_events(first, generation, answer, len(prompt), asked.include_usage), generation)


async def _at_once(generation: Generation, answer: Answer, prompt_tokens: int, request: Request) -> Response:
    text = ""
    async for piece in generation:
        text += piece.text
        if piece.finish:
            return JSONResponse(answer.whole(text, piece.finish, usage(prompt_tokens, piece.tokens)))
        if await request.is_disconnected():
            break
    generation.cancel()
    return Response(status_code=499)  # nobody reads it


async def _events(
    first: Piece, generation: Generation, answer: Answer, prompt_tokens: int, include_usage: bool
) -> AsyncIterator[str]:
    for chunk in answer.opening():
        yield _event(chunk)
    piece = first
    try:
        while True:
            if piece.text:
                yield _event(answer.chunk(piece.text))
            if piece.finish:
                break
            piece = await anext(generation)
    except Exception as error:
        yield _event(_shaped(error).body)
        return
    yield _event(answer.closing(piece.finish))
    if include_usage:
        yield _event(answer.tally(usage(prompt_tokens, piece.tokens)))
    yield "data: [DONE]\n\n"


def _event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events that end the generation when the client goes."""

    def __init__(self, events: AsyncIterator[str], generation: Generation) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


class Bearer:
    """Lets only requests with the right token through; ``/healthz`` is open.

    Args:
        app: what it guards.
        token: the right one.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass the request on."""
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) != "/healthz":
            brought = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(brought, self._expected):
                message = "this server needs its token: Authorization: Bearer …"
                refusal = ApiError(401, message, "authentication_error", code="invalid_api_key")
                headers = {"WWW-Authenticate": "Bearer"}
                await JSONResponse(refusal.body, refusal.status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _shaped(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LinkError):
        return ApiError(503, f"the link to the cloud: {error}", "server_error", code="link_error")
    if isinstance(error, Stopping):
        return ApiError(503, "the server is stopping", "server_error", code="stopping")
    _LOG.error("a generation failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", "server_error", code="internal_error")


async def _answer_error(_: Request, error: Exception) -> Response:
    shaped = _shaped(error)
    return JSONResponse(shaped.body, shaped.status)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:]).lstrip(".")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return await _answer_error(request, ApiError(400, "the body is not valid JSON"))
    return await _answer_error(request, ApiError(400, f"{path or 'the body'}: {message}", param=path or None))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return await _answer_error(request, ApiError(error.status_code, message))


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed; its log says why", "server_error").body, 500)


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """A listening socket; only a server with a token may be reached from other machines.

    Raises:
        RaycloudError: the port is taken, the address is not this machine's, or a token is missing.
    """
    if token is None and not _is_loopback(host):
        raise RaycloudError(
            f"--host {host} can be reached from other machines and needs a token: --token … or RAYCLOUD_EDGE_TOKEN"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]
        raise RaycloudError(f"cannot listen on {host}:{port}: {why}") from error


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def address_of(listening: socket.socket) -> str:
    """The base URL that clients of a listening socket use."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class Server(uvicorn.Server):
    """Serves an application of :func:`create_app` with ``run(sockets=[…])``; told to stop, it ends open answers.

    Args:
        app: the application.
    """

    def __init__(self, app: FastAPI) -> None:
        self._workers: Workers = app.state.workers
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_S))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End open answers with an error that says why, then everything else."""
        self._workers.close()
        await super().shutdown(sockets)
