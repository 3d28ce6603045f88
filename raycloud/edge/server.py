"""OpenAI-compatible HTTP server for a text model: a whole model, or one split between edge and cloud."""

from __future__ import annotations

import json
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from raycloud.edge.errors import ApiError, api_error
from raycloud.edge.generation import ChoiceDelta, Event, PromptRead
from raycloud.edge.middleware import BearerMiddleware, LocalHostMiddleware, header_timeout_protocol, read_body
from raycloud.edge.requests import ChatRequest, CompletionRequest, parse_request
from raycloud.edge.responses import ChatFormatter, CompletionFormatter, ResponseFormatter, model_entry, usage
from raycloud.edge.served_model import ServedModel
from raycloud.edge.workers import Generation, QueueFull, Workers
from raycloud.errors import RaycloudError
from raycloud.link.auth import Authenticator
from raycloud.link.meter import Meter
from raycloud.link.proxy import is_loopback
from raycloud.models.text_model import TextModel

_GRACE_S = 5
_HEAD_S = 10.0
_BODY_S = 30.0
_LINES = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""Escapes of line separators that JSON does not escape, and that break clients which read line by line."""


def create_app(
    model: TextModel | ServedModel,
    name: str,
    *,
    tokens: Sequence[str] = (),
    allow_hosts: Collection[str] = (),
    meter: Meter | None = None,
    concurrency: int = 4,
    waiting: int = 32,
    body_s: float = _BODY_S,
) -> FastAPI:
    """Application with ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models`` and ``/healthz``.

    Args:
        model: the model that generates the answers, or one whose versions change while it is served.
        name: name of the model for clients.
        tokens: clients must send one of them as ``Authorization: Bearer``; if empty, requests must name this machine.
        allow_hosts: host names accepted in addition to loopback ones if there is no token.
        meter: meter of the link to the cloud, shown by ``/healthz``.
        concurrency: number of generations at once.
        waiting: number of requests that may wait; further ones are answered with 429.
        body_s: time limit in seconds for the body of a request.
    """
    workers = Workers(concurrency, waiting)
    served = model if isinstance(model, ServedModel) else ServedModel(model)
    desk = _RequestHandler(served, name, workers, body_s)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        workers.close()

    app = FastAPI(title="raycloud", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.workers = workers
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_unexpected)
    if tokens:
        app.add_middleware(BearerMiddleware, authenticator=Authenticator(tokens))
    else:
        app.add_middleware(LocalHostMiddleware, allowed=allow_hosts)

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        link = {} if meter is None else {"link": {"bytes": dict(meter.payload), "messages": dict(meter.messages)}}
        version = served.current.version
        return {"status": "ok", "model": name, "system_fingerprint": version, "active": workers.active, **link}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_entry(name, created, served.current.version)]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        desk.check_name(wanted)
        return model_entry(name, created, served.current.version)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse_request(ChatRequest, await desk.body(request))
        return await desk.answer(asked, ChatFormatter, request)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = parse_request(CompletionRequest, await desk.body(request))
        return await desk.answer(asked, CompletionFormatter, request)

    return app


@dataclass(frozen=True)
class _RequestHandler:
    """Handler that runs a checked request in a worker thread and returns its answer."""

    served: ServedModel
    name: str
    workers: Workers
    body_s: float

    def check_name(self, wanted: str) -> None:
        if wanted != self.name:
            message = f"the model '{wanted}' does not exist; this server has '{self.name}'"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def body(self, request: Request) -> bytes:
        return await read_body(request, self.served.current.most_bytes, self.body_s)

    async def answer(
        self,
        asked: ChatRequest | CompletionRequest,
        formatter: type[ChatFormatter | CompletionFormatter],
        request: Request,
    ) -> Response:
        self.check_name(asked.model)
        runner = self.served.current  # one version answers a request from its first token to its last
        answer = formatter(self.name, runner.version, runner.spelling, asked.top is not None)
        try:
            generation = self.workers.start(runner.answer(asked))
        except QueueFull:
            raise ApiError(429, "too many requests wait already; try again", "rate_limit_error", code="busy") from None
        try:
            if not asked.stream:
                return await _at_once(generation, answer, request)
            # An error before the first token still gets its own HTTP status.
            opening = [await anext(generation), await anext(generation)]
        except BaseException as error:
            generation.cancel()
            if isinstance(error, Exception):
                raise api_error(error) from error
            raise
        return _EventStream(_events(opening, generation, answer, asked.include_usage), generation)


class _UsageCounter:
    """Counter of the tokens of the prompts and answers of a request."""

    def __init__(self) -> None:
        self._prompt, self._made = 0, dict[int, int]()

    def see(self, event: Event) -> None:
        match event:
            case PromptRead(tokens):
                self._prompt = tokens
            case ChoiceDelta(choice, made=made):
                self._made[choice] = made

    @property
    def usage(self) -> dict[str, int]:
        return usage(self._prompt, sum(self._made.values()))


async def _at_once(generation: Generation[Event], answer: ResponseFormatter, request: Request) -> Response:
    tally, choices = _UsageCounter(), defaultdict[int, list[ChoiceDelta]](list)
    async for event in generation:
        tally.see(event)
        if isinstance(event, ChoiceDelta):
            choices[event.choice].append(event)
        if await request.is_disconnected():
            generation.cancel()
            return Response(status_code=499)  # the client is gone and does not read it
    return JSONResponse(answer.whole([choices[index] for index in sorted(choices)], tally.usage))


async def _events(
    opening: list[Event], generation: Generation[Event], answer: ResponseFormatter, include_usage: bool
) -> AsyncIterator[str]:
    tally, begun = _UsageCounter(), set[int]()
    try:
        async for event in _chained(opening, generation):
            tally.see(event)
            if isinstance(event, ChoiceDelta):
                for chunk in answer.chunks(event, first=event.choice not in begun):
                    yield _event(chunk)
                begun.add(event.choice)
    except Exception as error:
        yield _event(api_error(error).body)
        return
    if include_usage:
        yield _event(answer.tally(tally.usage))
    yield "data: [DONE]\n\n"


async def _chained(opening: list[Event], generation: Generation[Event]) -> AsyncIterator[Event]:
    for event in opening:
        yield event
    async for event in generation:
        yield event


def _event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':')).translate(_LINES)}\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events that end the generation when the client disconnects."""

    def __init__(self, events: AsyncIterator[str], generation: Generation[Event]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


async def _answer_error(_: Request, error: Exception) -> Response:
    shaped = api_error(error)
    # The rest of a body that was not read to its end would be parsed as another request.
    headers = {"Connection": "close"} if shaped.status in (408, 413) else None
    return JSONResponse(shaped.body, shaped.status, headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return await _answer_error(request, ApiError(error.status_code, message))


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "the server failed; its log says why", "server_error").body, 500)


def bind(host: str, port: int, token: str | None) -> socket.socket:
    """Open a listening socket; only a server with a token may listen for other machines.

    Raises:
        RaycloudError: the port is in use, the address does not belong to this machine, or a token is missing.
    """
    if token is None and not is_loopback(host):
        raise RaycloudError(
            f"--host {host} can be reached from other machines and needs an API key: --api-key … or RAYCLOUD_API_KEY"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (while")[0]
        raise RaycloudError(f"cannot listen on {host}:{port}: {why}") from error


def address_of(listening: socket.socket) -> str:
    """Base URL of a listening socket for clients."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


class Server(uvicorn.Server):
    """Server of an application of :func:`create_app` with ``run(sockets=[…])``; at shutdown it ends open answers.

    Args:
        app: the application.
        head_s: time limit in seconds for the head of a request.
    """

    def __init__(self, app: FastAPI, *, head_s: float = _HEAD_S) -> None:
        self._workers: Workers = app.state.workers
        options: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": _GRACE_S}
        super().__init__(uvicorn.Config(app, http=header_timeout_protocol(head_s), **options))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End open answers with an error that names the reason, then shut down."""
        self._workers.close()
        await super().shutdown(sockets)
