"""Split inference between Ray actors: the same tokens, also after the actor died."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raycloud.cluster.actor_channel import CALLS_AT_ONCE, ActorChannel, CloudSegment
from raycloud.models.loading import load
from raycloud.split.generation import SplitModel
from raycloud.split.parts import load_edge
from raycloud.split.plan import PlanSet, SplitPlan
from raycloud.split.remote import RemoteMiddle, Terms
from raycloud.split.terms import Codecs

PLANS = PlanSet.of(SplitPlan(1, 3))


def segment(model: Path) -> Any:
    options = {"max_concurrency": CALLS_AT_ONCE, "resources": {"cloud": 1}, "num_cpus": 0.5}
    return ray.remote(CloudSegment).options(**options).remote(str(model), PLANS)


@pytest.mark.usefixtures("local_ray")
def test_tokens_are_those_of_the_whole_model_though_the_actor_dies(tiny_llama: Path) -> None:
    prompt = [5, 6, 7, 8, 9]
    whole: Any = load(str(tiny_llama), device="cpu").model
    reference = whole.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, min_new_tokens=12)
    edge = load_edge(str(tiny_llama), PLANS, device="cpu")
    actors = [segment(tiny_llama), segment(tiny_llama)]
    terms = Terms(edge.fingerprint, PLANS, Codecs(edge.config.hidden_size), "float32", 512)

    def connect() -> RemoteMiddle:
        return RemoteMiddle(lambda _: ActorChannel(actors[0]), terms)

    made = []
    for token in SplitModel(edge.first, edge.last, connect, PLANS).stream(prompt, 12):
        made.append(token)
        if len(made) == 6:
            ray.kill(actors.pop(0))
    assert made == reference[0, len(prompt) :].tolist()
    ray.kill(actors[0])
