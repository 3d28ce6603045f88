"""A teacher on Ray Serve: signals over one WebSocket for each edge."""

# No postponed annotations: Serve and FastAPI read those of the handlers and of the builder's argument.
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, WebSocket
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from raycloud.distill.signal_file import tokenizer_fingerprint
from raycloud.distill.signal_link import SignalHost, SignalLimits
from raycloud.models.loading import Device, DType, load
from raycloud.models.weights import fingerprint, weights_of
from raycloud.serving.door import Doorkeeper, SocketConnection, tokens_of

_IDLE_SOCKETS = 64


class TeacherSettings(BaseModel):
    """The arguments of the application; on the command line as ``key=value``, in a config file under ``args``."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """The teacher: a directory that every node can read, or anything else ``raycloud`` loads."""
    name: str | None = None
    """What signals' keys call it, beside a fingerprint of its weights; ``model`` if left out."""
    token: str | None = None
    """What edges must bring; several separated by commas. The variable RAYCLOUD_TOKEN if left out."""
    limits: SignalLimits = SignalLimits()
    device: Device = "auto"
    dtype: DType = "auto"
    threads: int | None = Field(None, ge=1)
    """Of torch, in each replica; torch's own choice if left out."""
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.5, gt=0)
    """What each replica claims of Ray's CPUs."""
    num_gpus: float = Field(0.0, ge=0)
    resources: dict[str, float] = {}
    """Custom resources each replica claims, such as ``{"cloud": 1}``."""


def build_api(host: SignalHost, door: Doorkeeper) -> FastAPI:
    """The HTTP and WebSocket face of one replica."""

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        yield
        await host.leave()

    api = FastAPI(title="raycloud teacher", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

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
    tokens = tokens_of(settings.token)

    def build() -> FastAPI:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        teacher = load(settings.model, device=settings.device, dtype=settings.dtype)
        name = f"{settings.name or settings.model}@{fingerprint(weights_of(teacher.model))}"
        tokenizer = tokenizer_fingerprint(teacher.tokenizer)
        return build_api(
            SignalHost(teacher.model, name, tokenizer, settings.limits, settings.threads), Doorkeeper(tokens)
        )

    sockets = settings.limits.connections + _IDLE_SOCKETS
    deployment = serve.deployment(
        name="teacher",
        # A WebSocket counts for its whole life.
        max_ongoing_requests=sockets,
        max_queued_requests=sockets,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": max(1, settings.limits.connections // 2),
        },
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "resources": settings.resources,
        },
    )
    return deployment(serve.ingress(build)()).bind()
