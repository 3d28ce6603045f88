"""Ray Serve application that serves a whole distilled student through an OpenAI-compatible API."""

# No postponed annotations: Serve reads the annotation of the builder's argument to validate it.
from pathlib import Path

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from raycloud.edge.server import create_app
from raycloud.edge.whole_model import load_whole
from raycloud.link.auth import server_tokens
from raycloud.serving.replicas import private_ingress


class StudentSettings(BaseModel):
    """Arguments of the application: ``key=value`` on the command line, ``args`` in a config file."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Student: a directory that every node can read, or anything else ``raycloud`` loads."""
    name: str | None = None
    """Name of the model in the API. Default: the last part of ``model``."""
    token: str | None = None
    """API key that clients must send; several are separated by commas. Default: the variable RAYCLOUD_TOKEN."""
    concurrency: int = Field(4, ge=1)
    """Generations at once in each replica. It accepts twice as many requests; more requests wait at the proxy."""
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(0.5, gt=0)
    """Ray CPUs that each replica reserves."""
    num_gpus: float = Field(0.0, ge=0)
    threads: int = Field(1, ge=1)
    """Torch threads in each replica."""


def app(settings: StudentSettings) -> Application:
    """Build the application that serves one student; each replica loads it once.

    Raises:
        RecipeError: no token is given. The proxy's host is not known here, so no token is never allowed.
    """
    tokens = server_tokens(settings.token)
    name = settings.name or Path(settings.model.removeprefix("builtin:")).name

    def build() -> FastAPI:
        torch.set_num_threads(settings.threads)
        return create_app(load_whole(settings.model), name, tokens=tokens, concurrency=settings.concurrency)

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
    return deployment(private_ingress(build)).bind()
