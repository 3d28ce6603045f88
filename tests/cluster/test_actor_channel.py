"""Split inference between Ray actors gives the same tokens, also after the actor died."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raycloud.cluster.actor_channel import CALLS_AT_ONCE, ActorChannel, ActorService
from raycloud.models.loading import load
from raycloud.split.cut_codecs import CutCodecs
from raycloud.split.inference.client import RemoteBlocks, SessionConfig
from raycloud.split.inference.engine import InferenceEngine
from raycloud.split.inference.generation import SplitTokenSource
from raycloud.split.inference.server import InferenceServer
from raycloud.split.parts import load_cloud, load_edge
from raycloud.split.plan import PlanSet, SplitPlan

PLANS = PlanSet.of(SplitPlan(1, 3))


class CloudSegment(ActorService):
    """Actor that serves the cloud part of a split model."""

    def __init__(self, model: str) -> None:
        part = load_cloud(model, PLANS, device="cpu")
        server = InferenceServer(InferenceEngine(part, threads=1), CutCodecs(part.config.hidden_size))
        super().__init__(partial(server.serve, principal="cluster"))


def segment(model: Path) -> Any:
    options = {"max_concurrency": CALLS_AT_ONCE, "resources": {"cloud": 1}, "num_cpus": 0.5}
    return ray.remote(CloudSegment).options(**options).remote(str(model))


@pytest.mark.usefixtures("local_ray")
def test_tokens_are_those_of_the_whole_model_though_the_actor_dies(tiny_llama: Path) -> None:
    prompt = [5, 6, 7, 8, 9]
    whole: Any = load(str(tiny_llama), device="cpu").model
    reference = whole.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, min_new_tokens=12)
    edge = load_edge(str(tiny_llama), PLANS, device="cpu")
    actors = [segment(tiny_llama), segment(tiny_llama)]
    ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=240)  # a busy machine starts them slowly
    codecs = CutCodecs(edge.config.hidden_size)
    config = SessionConfig(edge.fingerprint, PLANS, codecs, "float32", 512, patience_s=240)

    def connect() -> RemoteBlocks:
        return RemoteBlocks(lambda _: ActorChannel(actors[0]), config)

    made = []
    for token in SplitTokenSource(edge.first, edge.last, connect, PLANS).stream(prompt, 12):
        made.append(token)
        if len(made) == 6:
            ray.kill(actors.pop(0))
    assert made == reference[0, len(prompt) :].tolist()
    ray.kill(actors[0])
