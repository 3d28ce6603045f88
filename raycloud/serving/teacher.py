"""Ray Serve application that sends a teacher's signals to edges, over one WebSocket each."""

# No postponed annotations: Serve and FastAPI read those of the handlers and of the builder's argument.
from typing import Any

import torch
from fastapi import FastAPI, WebSocket
from ray.serve import Application

from raycloud.distill.signals.file import tokenizer_fingerprint
from raycloud.distill.signals.remote import ModelTeacher, SignalLimits, SignalServer
from raycloud.link.auth import Authenticator
from raycloud.models.loading import load
from raycloud.models.weights import fingerprint, weights_of
from raycloud.serving.auth import SocketConnection, admit
from raycloud.serving.replicas import ReplicaSettings, new_api, replicated_app

_IDLE_SOCKETS = 64


class TeacherSettings(ReplicaSettings):
    """Arguments of the application: ``key=value`` on the command line, ``args`` in a config file."""

    model: str
    """Teacher: a directory that every node can read, or anything else ``raycloud`` loads."""
    name: str | None = None
    """Name of the teacher in the keys of signals, followed by a fingerprint of its weights. Default: ``model``."""
    limits: SignalLimits = SignalLimits()


def build_api(host: SignalServer, authenticator: Authenticator) -> FastAPI:
    """Make the HTTP and WebSocket API of one replica."""
    api = new_api("raycloud teacher", host.leave)

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "sessions": host.sessions}

    @api.websocket("/v1/signals")
    async def signals(socket: WebSocket) -> None:
        principal = await admit(socket, authenticator)
        if principal is not None:
            await host.serve(SocketConnection(socket), principal)

    return api


def app(settings: TeacherSettings) -> Application:
    """Build the application that serves one teacher; each replica loads it once.

    Raises:
        RecipeError: no token is given. The proxy's host is not known here, so no token is never allowed.
    """
    tokens = settings.tokens

    def build() -> FastAPI:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        teacher = load(settings.model, device=settings.device, dtype=settings.dtype)
        name = f"{settings.name or settings.model}@{fingerprint(weights_of(teacher.model))}"
        tokenizer = tokenizer_fingerprint(teacher.tokenizer)
        return build_api(
            SignalServer(ModelTeacher(teacher.model, name, tokenizer), settings.limits, settings.threads),
            Authenticator(tokens),
        )

    return replicated_app("teacher", build, settings, edges=settings.limits.sessions, idle=_IDLE_SOCKETS, sticky=True)
