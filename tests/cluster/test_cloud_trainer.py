"""Cloud actor of edges that train together, without Ray."""

from __future__ import annotations

import inspect

from raycloud.cluster.cloud_trainer import CloudTrainerActor, limits_for
from raycloud.split.finetune.recipe import SplitTuneRecipe


def test_no_method_is_a_coroutine() -> None:
    """No method is async: Ray would run all on one event loop, and an edge waiting for a round would block the
    others."""
    assert not [name for name, method in inspect.getmembers(CloudTrainerActor) if inspect.iscoroutinefunction(method)]


def test_there_is_room_for_whatever_a_recipe_asks_for() -> None:
    edges = [{"name": f"e{number}"} for number in range(20)]
    recipe = SplitTuneRecipe.parse(
        {
            "edges": edges,
            "task": {"kind": "classification", "classes": ["a", "b"]},
            "data": {"max_length": 512},
            "training": {"batch_size": 64},
            "max_in_flight": 40,
        }
    )
    limits = limits_for(recipe)
    assert limits.sessions == limits.sessions_per_principal == limits.runs == 80
    assert limits.tokens == 64 * 512
    assert limits.micro_batches == 40
    assert limits.outstanding == 40 * 64 * 512
