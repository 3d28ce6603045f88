"""The cloud's actor of edges that train together, without Ray."""

from __future__ import annotations

import inspect

import pytest

from raycloud.cluster.actor_channel import CloudSegment
from raycloud.cluster.cloud_tuner import CloudTuner, limits_for
from raycloud.split.finetune.recipe import SplitTuneRecipe


@pytest.mark.parametrize("actor", [CloudTuner, CloudSegment])
def test_no_method_is_a_coroutine(actor: type) -> None:
    """Ray would run all methods on one event loop then, and an edge that waits for a round would keep all others."""
    assert not [name for name, method in inspect.getmembers(actor) if inspect.iscoroutinefunction(method)]


def test_there_is_room_for_whatever_a_recipe_asks_for() -> None:
    edges = [{"name": f"e{number}"} for number in range(20)]
    recipe = SplitTuneRecipe.parse(
        {
            "edges": edges,
            "task": {"kind": "classification", "classes": ["a", "b"]},
            "data": {"max_length": 512},
            "training": {"batch_size": 64},
            "depth": 40,
        }
    )
    limits = limits_for(recipe)
    assert limits.sessions == limits.sessions_per_principal == limits.runs == 80
    assert limits.tokens == 64 * 512
    assert limits.micros == 40
    assert limits.outstanding == 40 * 64 * 512
