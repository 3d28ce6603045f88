"""Ray Serve application that runs the cloud's part of a split model; each session has one WebSocket."""

# No postponed annotations: Serve and FastAPI read those of the handlers and of the builder's argument.
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request, Response, WebSocket
from pydantic import Field
from ray.serve import Application

from raycloud.cluster.metrics import RayMetrics
from raycloud.errors import RecipeError
from raycloud.link.auth import Authenticator
from raycloud.serving.auth import SocketConnection, admit, principal_of
from raycloud.serving.replicas import ReplicaSettings, new_api, replicated_app
from raycloud.split.calibration import Calibration
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.engine import InferenceEngine
from raycloud.split.inference.limits import InferenceLimits
from raycloud.split.inference.server import InferenceServer
from raycloud.split.inference.server_info import ServerInfo
from raycloud.split.parts import CloudPart, load_cloud
from raycloud.split.plan import PlanSet

_IDLE_SOCKETS = 256


class SplitSettings(ReplicaSettings):
    """Arguments of the application: ``key=value`` on the command line, ``args`` in a config file."""

    model: str
    """Whole model, or exported ``cloud`` directory that every node can read."""
    name: str | None = None
    """Name of the model in the API. Default: the last part of ``model``."""
    start_block: int | None = Field(None, ge=0)
    """The cloud's first block; as exported if left out."""
    end_block: int | None = Field(None, ge=0)
    """The block after the cloud's last one; as exported if left out."""
    calibration: str | None = None
    """File made by ``raycloud split calibrate``; without it only float codecs are offered."""
    limits: InferenceLimits = InferenceLimits()

    @property
    def plans(self) -> PlanSet | None:
        """Plan of the cuts; None for an exported part, which has its own."""
        if self.start_block is None and self.end_block is None:
            return None
        if self.start_block is None or self.end_block is None:
            raise RecipeError("give both start_block and end_block, or neither for an exported part")
        return PlanSet((self.start_block,), (self.end_block,))


def build_api(
    name: str,
    part: CloudPart,
    host: InferenceServer,
    server_info: ServerInfo,
    calibration: bytes | None,
    authenticator: Authenticator,
) -> FastAPI:
    """Make the HTTP and WebSocket API of one replica."""
    api = new_api("raycloud split", host.leave)

    async def check(request: Request) -> None:
        if await principal_of(request, authenticator) is None:
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "sessions": host.sessions}

    @api.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        await check(request)
        described = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "raycloud",
            "split": server_info.model_dump(),
        }
        return {"object": "list", "data": [described]}

    @api.get("/v1/calibration")
    async def calibrated(request: Request) -> Response:
        await check(request)
        if calibration is None:
            raise HTTPException(404, "this model's codecs are not calibrated")
        return Response(calibration, media_type="application/octet-stream")

    @api.websocket("/v1/split")
    async def split(socket: WebSocket) -> None:
        principal = await admit(socket, authenticator)
        if principal is not None:
            await host.serve(SocketConnection(socket), principal)

    return api


def app(settings: SplitSettings) -> Application:
    """Build the application that serves the middle blocks of one model; each replica loads only those blocks."""
    tokens, plans = settings.tokens, settings.plans
    name = settings.name or Path(settings.model.removeprefix("builtin:")).name

    def build() -> FastAPI:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        part = load_cloud(settings.model, plans, device=settings.device, dtype=settings.dtype)
        calibration = Path(settings.calibration).read_bytes() if settings.calibration else None
        calibrated = Calibration.load(Path(settings.calibration)) if settings.calibration else None
        codecs = CutCodecs(part.config.hidden_size, calibrated)
        metrics = RayMetrics(name)
        engine = InferenceEngine(part, metrics, settings.threads)
        host = InferenceServer(engine, codecs, settings.limits, metrics)
        return build_api(
            name, part, host, ServerInfo.of(part, codecs, settings.limits), calibration, Authenticator(tokens)
        )

    # A session reconnects to its replica. If the replica is gone, the edge rebuilds the session from its own records.
    return replicated_app("split", build, settings, edges=settings.limits.sessions, idle=_IDLE_SOCKETS, sticky=True)
