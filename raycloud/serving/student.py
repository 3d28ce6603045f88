"""A whole distilled student as an OpenAI-compatible endpoint on Ray Serve."""

# No postponed annotations: Serve reads the class that the builder's argument is validated by.
import os
from pathlib import Path

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from raycloud.edge.local import whole
from raycloud.edge.server import create_app
from raycloud.errors import RecipeError

TOKEN = "RAYCLOUD_TOKEN"


class StudentSettings(BaseModel):
    """The arguments of the application; on the command line as ``key=value``, in a config file under ``args``."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """The student: a directory that every node can read, or anything else ``raycloud`` loads."""
    name: str | None = None
    """What clients call it; the last part of ``model`` if left out."""
    token: str | None = None
    """What clients bring as their API key; the variable RAYCLOUD_TOKEN if left out."""
    concurrency: int = Field(4, ge=1)
    """Generations at once in each replica; twice as many requests are let in, the others wait at the proxy."""
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.5, gt=0)
    """What each replica claims of Ray's CPUs."""
    num_gpus: float = Field(0.0, ge=0)
    threads: int = Field(1, ge=1)
    """Of torch, in each replica."""


def app(settings: StudentSettings) -> Application:
    """The application that serves one student; each replica loads it once.

    Raises:
        RecipeError: no token is given. The proxy's host is not known here, so none is open by default.
    """
    token = settings.token or os.environ.get(TOKEN)
    if not token:
        raise RecipeError(f"no token: set {TOKEN} or the argument token; clients must bring it")
    name = settings.name or Path(settings.model.removeprefix("builtin:")).name

    def build() -> FastAPI:
        torch.set_num_threads(settings.threads)
        return create_app(whole(settings.model), name, token=token, concurrency=settings.concurrency)

    deployment = serve.deployment(
        name="student",
        max_ongoing_requests=2 * settings.concurrency,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.concurrency,
        },
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
    )
    return deployment(serve.ingress(build)()).bind()
