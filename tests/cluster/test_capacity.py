"""Capacity checks of a cluster for a job, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycloud.cluster.capacity import Capacity, Shortfall, shortfall, total_resources, unplaceable_actors
from raycloud.distill.recipe import bundles
from raycloud.recipe import Bundle
from tests.cluster.recipes import small

CLOUD: Bundle = {"CPU": 4.0, "GPU": 1.0, "cloud": 1.0}
EDGE: Bundle = {"CPU": 1.0, "edge": 1.0}


def of(*nodes: Bundle) -> Capacity:
    return Capacity(nodes, total_resources(nodes))


def test_a_job_that_fits_is_let_through() -> None:
    actors: list[Bundle] = [{"CPU": 0.25, "cloud": 1.0}, {"CPU": 0.25, "edge": 1.0}, {"CPU": 0.25, "edge": 1.0}]
    assert shortfall(total_resources(actors), actors, of(CLOUD, EDGE, EDGE)) is None
    assert unplaceable_actors(actors, [CLOUD, EDGE, EDGE]) == 0


@pytest.mark.parametrize(
    ("actors", "what"),
    [
        ([{"edge": 1.0}] * 3, "has 2 of the resource 'edge', this job needs 3"),
        ([{"GPU": 2.0}], "has 1 of the resource 'GPU', this job needs 2"),
        # In all there is enough of both, on no single node.
        ([{"CPU": 2.0, "edge": 1.0}], "no node has 2 CPU and 1 edge together"),
        ([{"GPU": 1.0, "edge": 1.0}], "no node has 1 GPU and 1 edge together"),
    ],
)
def test_a_job_that_would_wait_for_ever_is_refused(actors: list[Bundle], what: str) -> None:
    found = shortfall(total_resources(actors), actors, of(CLOUD, EDGE, EDGE))
    assert isinstance(found, Shortfall)
    assert what in found.what
    assert found.fix


def test_nodes_that_an_autoscaler_may_start_count() -> None:
    actors: list[Bundle] = [{"CPU": 1.0, "edge": 1.0}] * 5
    none = Capacity((), {})
    assert shortfall(total_resources(actors), actors, none) is not None
    grown = Capacity((EDGE,), {"CPU": 8.0, "edge": 8.0}, grows=True)
    assert shortfall(total_resources(actors), actors, grown) is None


def test_actors_that_fit_alone_may_be_too_many_together() -> None:
    nodes: list[Bundle] = [{"CPU": 4.0}, {"CPU": 1.0, "edge": 2.0}]
    actors: list[Bundle] = [{"CPU": 1.0, "edge": 1.0}] * 2
    assert shortfall(total_resources(actors), actors, of(*nodes)) is None
    assert unplaceable_actors(actors, nodes) == 1
    assert unplaceable_actors([{"CPU": 0.1}] * 10, [{"CPU": 1.0}]) == 0  # tenths do not add up exactly


def test_bundles_are_those_of_every_edges_own_student(tmp_path: Path) -> None:
    own = {"name": "big", "student": {"blocks": 2, "placement": {"num_cpus": 2.0, "num_gpus": 0.5}}}
    recipe = small(tmp_path, tmp_path, edges=[{"name": "store"}, own], teacher={"replicas": 2})
    assert bundles(recipe) == [
        {"CPU": 0.1, "cloud": 1.0},
        {"CPU": 0.1, "cloud": 1.0},
        {"CPU": 0.1, "edge": 1.0},
        {"CPU": 2.0, "GPU": 0.5, "edge": 1.0},
    ]
