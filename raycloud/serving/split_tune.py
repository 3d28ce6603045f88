"""The cloud's side of split fine-tuning on Ray Serve: a session over one WebSocket for each edge."""

# No postponed annotations: Serve and FastAPI read those of the handlers and of the builder's argument.
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, WebSocket
from pydantic import Field
from ray.serve import Application

from raycloud.cluster.metrics import RayMetrics
from raycloud.serving.door import Doorkeeper, SocketConnection
from raycloud.serving.replicas import ReplicaSettings, api_of, replicated
from raycloud.split.finetune.host import TuneHost, TuneLimits
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet

_IDLE_SOCKETS = 64


class SplitTuneSettings(ReplicaSettings):
    """The arguments of the application; on the command line as ``key=value``, in a config file under ``args``."""

    model: str
    """A whole model, or an exported ``cloud`` directory that every node can read."""
    first: int = Field(ge=0)
    """The cloud's first block: the edges' ``split``."""
    second: int = Field(gt=0)
    """The block after the cloud's last one."""
    checkpoints: str
    """A folder that every replica sees: an edge goes on from it wherever its session is opened again."""
    dtype: Literal["auto", "float32"] = "auto"
    """Weights that are trained are float32 in either case."""
    limits: TuneLimits = TuneLimits()
    labels: bool = False
    """Whether edges may send labels, for a loss that is computed here; otherwise those that would are refused. The
    model must be a whole one then, and ``second`` its last block's end."""


def build_api(host: TuneHost, door: Doorkeeper) -> FastAPI:
    """The WebSocket face of one replica."""
    api = api_of("raycloud split-tune", host.leave)

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "sessions": host.sessions}

    @api.websocket("/v1/split-tune")
    async def split_tune(socket: WebSocket) -> None:
        principal = await door.admit(socket)
        if principal is not None:
            await host.serve(SocketConnection(socket), principal)

    return api


def app(settings: SplitTuneSettings) -> Application:
    """The application that trains the middle of one model, for each edge by itself or for those of a group together.

    The members of a group come to one replica, as a session's connections do.
    """
    tokens, plans = settings.tokens, PlanSet((settings.first,), (settings.second,))
    name = Path(settings.model.removeprefix("builtin:")).name

    def build() -> FastAPI:
        part = load_cloud(
            settings.model, plans, device=settings.device, dtype="float32", training=True, tail=settings.labels
        )
        folder = Path(settings.checkpoints).expanduser()
        host = TuneHost(part, folder, settings.limits, RayMetrics(name), settings.threads)
        return build_api(host, Doorkeeper(tokens))

    return replicated("split-tune", build, settings, edges=settings.limits.sessions, idle=_IDLE_SOCKETS, sticky=True)
