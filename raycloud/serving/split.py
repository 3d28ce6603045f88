"""The cloud's part of a split model on Ray Serve: sessions over one WebSocket each."""

# No postponed annotations: Serve and FastAPI read those of the handlers and of the builder's argument.
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request, Response, WebSocket
from pydantic import Field
from ray import serve
from ray.serve import Application

from raycloud.cluster.metrics import RayMetrics
from raycloud.errors import RecipeError
from raycloud.serving.door import Doorkeeper, SocketConnection
from raycloud.serving.replicas import ReplicaSettings, api_of, replicated
from raycloud.split.calibration import Calibration
from raycloud.split.cloud.engine import Engine
from raycloud.split.cloud.host import Host
from raycloud.split.cloud.limits import Limits
from raycloud.split.offer import Offer
from raycloud.split.parts import CloudPart, load_cloud
from raycloud.split.plan import PlanSet
from raycloud.split.terms import Codecs

_IDLE_SOCKETS = 256


class SplitSettings(ReplicaSettings):
    """The arguments of the application; on the command line as ``key=value``, in a config file under ``args``."""

    model: str
    """A whole model, or an exported ``cloud`` directory that every node can read."""
    name: str | None = None
    """What edges call it; the last part of ``model`` if left out."""
    first: int | None = Field(None, ge=0)
    """The cloud's first block; as exported if left out."""
    second: int | None = Field(None, ge=0)
    """The block after the cloud's last one; as exported if left out."""
    calibration: str | None = None
    """A file of ``raycloud split calibrate``; without it only float codecs are offered."""
    limits: Limits = Limits()

    @property
    def plans(self) -> PlanSet | None:
        """Where the model is cut; None for as exported."""
        if self.first is None and self.second is None:
            return None
        if self.first is None or self.second is None:
            raise RecipeError("give both first and second, or neither for an exported part")
        return PlanSet((self.first,), (self.second,))


def build_api(
    name: str, part: CloudPart, host: Host, offer: Offer, calibration: bytes | None, door: Doorkeeper
) -> FastAPI:
    """The HTTP and WebSocket face of one replica."""
    api = api_of("raycloud split", host.leave)

    def check(request: Request) -> None:
        if door.principal(request.headers.get("authorization")) is None:
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "sessions": host.sessions}

    @api.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check(request)
        described = {"id": name, "object": "model", "created": 0, "owned_by": "raycloud", "split": offer.model_dump()}
        return {"object": "list", "data": [described]}

    @api.get("/v1/calibration")
    async def calibrated(request: Request) -> Response:
        check(request)
        if calibration is None:
            raise HTTPException(404, "this model's codecs are not calibrated")
        return Response(calibration, media_type="application/octet-stream")

    @api.websocket("/v1/split")
    async def split(socket: WebSocket) -> None:
        principal = await door.admit(socket)
        if principal is not None:
            await host.serve(SocketConnection(socket), principal)

    return api


def app(settings: SplitSettings) -> Application:
    """The application that serves the middle of one model; each replica loads only its own blocks."""
    tokens, plans = settings.tokens, settings.plans
    name = settings.name or Path(settings.model.removeprefix("builtin:")).name

    def build() -> FastAPI:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        part = load_cloud(settings.model, plans, device=settings.device, dtype=settings.dtype)
        calibration = Path(settings.calibration).read_bytes() if settings.calibration else None
        calibrated = Calibration.load(Path(settings.calibration)) if settings.calibration else None
        codecs = Codecs(part.config.hidden_size, calibrated)
        metrics = RayMetrics(name)
        engine = Engine(part, metrics, settings.threads)
        replica = serve.get_replica_context().replica_id.unique_id
        host = Host(engine, codecs, settings.limits, metrics, replica)
        return build_api(name, part, host, Offer.of(part, codecs, settings.limits), calibration, Doorkeeper(tokens))

    # A session returns to its replica; where that is gone it is rebuilt from what the edge kept.
    return replicated("split", build, settings, edges=settings.limits.sessions, idle=_IDLE_SOCKETS, sticky=True)
