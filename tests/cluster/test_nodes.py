"""Several real nodes on one machine: placement of a job's actors, and nodes that leave and join."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.one_machine import on_one_machine
from tests.cluster.recipes import small


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_actors_are_where_their_resources_are_and_nodes_may_leave_and_join(tiny_llama: Path, tmp_path: Path) -> None:
    rounds = {"count": 3, "steps": 20, "deadline_s": 300, "rejoin_s": 300}
    seen = on_one_machine(small(tiny_llama, tmp_path / "run", rounds=rounds), tmp_path)
    in_the_cloud = {"CloudTeacher": ["head"], "_QueueActor": ["head"]}  # the run's log is with its driver
    assert seen["before"] == {**in_the_cloud, "EdgeStudent": ["edge-a", "edge-b"]}
    (left,) = {"edge-a", "edge-b"} - {seen["removed"]}
    assert seen["after"] == {**in_the_cloud, "EdgeStudent": sorted([left, "edge-c"])}
    assert seen["rounds"] == 3
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(one["students"]) for one in records if one["kind"] == "round"] == [
        ["newsroom", "store"], ["newsroom"], ["newsroom", "store"]
    ]  # fmt: skip
    assert [(one["round"], one["student"]) for one in records if one["kind"] == "missed"] == [(1, "store")]
