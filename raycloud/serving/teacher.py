"""A teacher on Ray Serve: signals over one WebSocket for each edge."""

# No postponed annotations: Serve and FastAPI read those of the handlers and of the builder's argument.
from typing import Any

import torch
from fastapi import FastAPI, WebSocket
from ray.serve import Application

from raycloud.distill.signal_file import tokenizer_fingerprint
from raycloud.distill.signal_link import SignalHost, SignalLimits
from raycloud.models.loading import load
from raycloud.models.weights import fingerprint, weights_of
from raycloud.serving.door import Doorkeeper, SocketConnection
from raycloud.serving.replicas import ReplicaSettings, api_of, replicated

_IDLE_SOCKETS = 64


class TeacherSettings(ReplicaSettings):
    """The arguments of the application; on the command line as ``key=value``, in a config file under ``args``."""

    model: str
    """The teacher: a directory that every node can read, or anything else ``raycloud`` loads."""
    name: str | None = None
    """What signals' keys call it, beside a fingerprint of its weights; ``model`` if left out."""
    limits: SignalLimits = SignalLimits()


def build_api(host: SignalHost, door: Doorkeeper) -> FastAPI:
    """The HTTP and WebSocket face of one replica."""
    api = api_of("raycloud teacher", host.leave)

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "connections": host.connections}

    @api.websocket("/v1/signals")
    async def signals(socket: WebSocket) -> None:
        if await door.admit(socket) is not None:
            await host.serve(SocketConnection(socket))

    return api


def app(settings: TeacherSettings) -> Application:
    """The application that serves one teacher; each replica loads it once.

    Raises:
        RecipeError: no token is given. The proxy's host is not known here, so none is open by default.
    """
    tokens = settings.tokens

    def build() -> FastAPI:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        teacher = load(settings.model, device=settings.device, dtype=settings.dtype)
        name = f"{settings.name or settings.model}@{fingerprint(weights_of(teacher.model))}"
        tokenizer = tokenizer_fingerprint(teacher.tokenizer)
        return build_api(
            SignalHost(teacher.model, name, tokenizer, settings.limits, settings.threads), Doorkeeper(tokens)
        )

    return replicated("teacher", build, settings, edges=settings.limits.connections, idle=_IDLE_SOCKETS)
