"""Gate of a distillation's rounds: an aggregate that is worse on held-out text does not become the student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raycloud.jobs.distill import run
from raycloud.rounds.versions import VersionStore
from tests.cluster.recipes import small
from tests.jobs.distill_run import records, weights

pytestmark = pytest.mark.usefixtures("local_ray")


def test_a_round_that_makes_the_students_worse_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    wild = {"lr": 5.0, "max_grad_norm": 1e9, "warmup_steps": 0}
    edges, rounds = [{"name": "edge"}], {"count": 2, "steps": 2}
    kept = run(small(tiny_llama, tmp_path / "kept", edges=edges, training=wild, rounds={**rounds, "gate": "held_out"}))
    assert [record["round"] for record in records(tmp_path / "kept", "gate_refused")] == [0, 1]
    assert kept["student_ppl_after"] == kept["student_ppl_before"] and kept["rounds"] == 2
    taken = run(small(tiny_llama, tmp_path / "taken", edges=edges, training=wild, rounds=rounds))
    assert not taken["student_ppl_after"] <= taken["student_ppl_before"]  # perhaps not even a number
    assert records(tmp_path / "taken", "gate_refused") == []
    assert [VersionStore(tmp_path / name / "versions").current for name in ("kept", "taken")] == [0, 2]
    same = zip(weights(tmp_path / "kept").items(), weights(tmp_path / "taken").values(), strict=True)
    assert any(not torch.equal(mine, theirs) for (_, mine), theirs in same)
