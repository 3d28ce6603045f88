"""Ray Serve application that trains the cloud's part in split fine-tuning; each edge has one session and WebSocket."""

# No postponed annotations: Serve and FastAPI read those of the handlers and of the builder's argument.
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, WebSocket
from pydantic import Field
from ray.serve import Application

from raycloud.cluster.metrics import RayMetrics
from raycloud.link.auth import Authenticator
from raycloud.serving.auth import SocketConnection, admit
from raycloud.serving.replicas import ReplicaSettings, new_api, replicated_app
from raycloud.split.finetune.server import TuneLimits, TuneServer
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet

_IDLE_SOCKETS = 64


class SplitTuneSettings(ReplicaSettings):
    """Arguments of the application: ``key=value`` on the command line, ``args`` in a config file."""

    model: str
    """Whole model, or exported ``cloud`` directory that every node can read."""
    start_block: int = Field(ge=0)
    """The cloud's first block: the edges' ``start_block``."""
    end_block: int = Field(gt=0)
    """The block after the cloud's last one."""
    checkpoints: str
    """Folder that every replica can read and write: a session reopened on any replica resumes from it."""
    dtype: Literal["auto", "float32"] = "auto"
    """Dtype of the weights. Trained weights are float32 in either case."""
    limits: TuneLimits = TuneLimits()
    labels: bool = False
    """Permission for edges to send labels, so that the cloud computes the loss; if false, such edges are refused. If
    true, ``model`` must be a whole model, and ``end_block`` its number of blocks."""


def build_api(server: TuneServer, authenticator: Authenticator) -> FastAPI:
    """Make the WebSocket API of one replica."""
    api = new_api("raycloud split-tune", server.leave)

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "sessions": server.sessions}

    @api.websocket("/v1/split-tune")
    async def split_tune(socket: WebSocket) -> None:
        principal = await admit(socket, authenticator)
        if principal is not None:
            await server.serve(SocketConnection(socket), principal)

    return api


def app(settings: SplitTuneSettings) -> Application:
    """Build the application that trains the middle blocks of one model, for single edges or for groups of edges.

    All members of a group are routed to one replica, as are all connections of a session.
    """
    tokens, plans = settings.tokens, PlanSet((settings.start_block,), (settings.end_block,))
    name = Path(settings.model.removeprefix("builtin:")).name

    def build() -> FastAPI:
        part = load_cloud(
            settings.model, plans, device=settings.device, dtype="float32", training=True, tail=settings.labels
        )
        folder = Path(settings.checkpoints).expanduser()
        server = TuneServer(part, folder, settings.limits, RayMetrics(name), settings.threads)
        return build_api(server, Authenticator(tokens))

    return replicated_app(
        "split-tune", build, settings, edges=settings.limits.sessions, idle=_IDLE_SOCKETS, sticky=True
    )
