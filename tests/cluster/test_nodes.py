"""Several real nodes on one machine: where a job puts its actors, and what becomes of it when nodes leave and join."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.recipes import small

ROOT = Path(__file__).parents[2]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_actors_are_where_their_resources_are_and_nodes_may_leave_and_join(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    rounds = {"count": 3, "steps": 60, "deadline_s": 300, "rejoin_s": 300}
    path.write_text(small(tiny_llama, tmp_path / "run", rounds=rounds).dump())
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.one_machine", str(path)],
        env={**env, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["before"] == {"CloudTeacher": ["head"], "EdgeStudent": ["edge-a", "edge-b"]}
    (left,) = {"edge-a", "edge-b"} - {seen["removed"]}
    assert seen["after"] == {"CloudTeacher": ["head"], "EdgeStudent": sorted([left, "edge-c"])}
    assert seen["rounds"] == 3
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [sorted(one["students"]) for one in records if one["kind"] == "round"] == [
        ["newsroom", "store"], ["newsroom"], ["newsroom", "store"]
    ]  # fmt: skip
    assert [(one["round"], one["student"]) for one in records if one["kind"] == "missed"] == [(1, "store")]
