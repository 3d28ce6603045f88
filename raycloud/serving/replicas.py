"""What applications share whose edges each hold a socket: settings, the API's life, and the deployment of replicas."""

# No postponed annotations: Serve reads the classes that the builders' arguments are validated by.
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from raycloud.models.loading import Device, DType
from raycloud.serving.door import tokens_of

_STICKY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class ReplicaSettings(BaseModel):
    """The arguments of an application; on the command line as ``key=value``, in a config file under ``args``."""

    model_config = ConfigDict(extra="forbid")

    token: str | None = None
    """What edges must bring; several separated by commas. The variable RAYCLOUD_TOKEN if left out."""
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

    @property
    def tokens(self) -> list[str]:
        """The tokens let in.

        Raises:
            RecipeError: there is none. The proxy's host is not known here, so none is open by default.
        """
        return tokens_of(self.token)


def api_of(title: str, leave: Callable[[], Awaitable[None]]) -> FastAPI:
    """An API without pages about itself, whose replica takes its leave of the edges when it stops."""

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        yield
        await leave()

    return FastAPI(title=title, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)


def replicated(
    name: str, build: Callable[[], FastAPI], settings: ReplicaSettings, *, edges: int, idle: int, sticky: bool = False
) -> Application:
    """The application whose replicas each run one API.

    Args:
        name: of the deployment.
        build: makes the API, in the replica.
        settings: how many replicas, and what each claims.
        edges: how many a replica serves at once; with half as many on each, another one is started.
        idle: sockets beyond them that wait or are turned away.
        sticky: all connections of a session, or of whatever else a connection says it belongs to, come to one replica
            for as long as that is there.
    """
    # A WebSocket counts for its whole life.
    sockets = edges + idle
    router: dict[str, Any] = {"request_router_config": {"request_router_class": _STICKY}} if sticky else {}
    deployment = serve.deployment(
        name=name,
        max_ongoing_requests=sockets,
        max_queued_requests=sockets,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": max(1, edges // 2),
        },
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "resources": settings.resources,
        },
        **router,
    )
    return deployment(serve.ingress(build)()).bind()
