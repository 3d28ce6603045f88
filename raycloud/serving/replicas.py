"""Settings, API lifespan and deployment that all applications with one WebSocket per edge share."""

# No postponed annotations: Serve reads the annotation of a builder's argument to validate it.
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from raycloud.cluster.runtime import protect_token
from raycloud.link.auth import server_tokens
from raycloud.models.devices import Device, DType

_STICKY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class ReplicaSettings(BaseModel):
    """Arguments of an application: ``key=value`` on the command line, ``args`` in a config file."""

    model_config = ConfigDict(extra="forbid")

    token: str | None = None
    """Bearer token that edges must send; several are separated by commas. Default: the variable RAYCLOUD_TOKEN."""
    device: Device = "auto"
    dtype: DType = "auto"
    threads: int | None = Field(None, ge=1)
    """Torch threads in each replica. Default: torch's own choice."""
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.5, gt=0)
    """Ray CPUs that each replica reserves."""
    num_gpus: float = Field(0.0, ge=0)
    resources: dict[str, float] = {}
    """Custom Ray resources that each replica reserves, such as ``{"cloud": 1}``."""

    @property
    def tokens(self) -> list[str]:
        """Accepted tokens.

        Raises:
            RecipeError: no token is given. The proxy's host is not known here, so no token is never allowed.
        """
        return server_tokens(self.token)


def new_api(title: str, leave: Callable[[], Awaitable[None]]) -> FastAPI:
    """Make an API without documentation pages.

    Args:
        title: title of the API.
        leave: called when the replica stops, to say so to the connected edges.
    """

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        yield
        await leave()

    return FastAPI(title=title, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)


def private_ingress(build: Callable[[], FastAPI]) -> Any:
    """Make the ingress class of an API, and hide Ray's token from other users of the machine.

    The token is hidden here and again in each replica, because ``serve run`` starts Ray after an application is bound.

    Args:
        build: makes the API; called in the replica.
    """
    protect_token()

    def guarded() -> FastAPI:
        protect_token()
        return build()

    return serve.ingress(guarded)()


def replicated_app(
    name: str, build: Callable[[], FastAPI], settings: ReplicaSettings, *, edges: int, idle: int, sticky: bool = False
) -> Application:
    """Bind an application whose replicas each run one API.

    Args:
        name: name of the deployment.
        build: makes the API; called in the replica.
        settings: number of replicas, and the resources that each reserves.
        edges: edges that a replica serves at once. Serve adds a replica when the mean load exceeds half of this.
        idle: sockets accepted beyond ``edges``; they wait or are refused.
        sticky: route all connections that name the same session or group to one replica while it lives.
    """
    # A WebSocket counts as an ongoing request for as long as it is open.
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
    return deployment(private_ingress(build)).bind()
