"""Block retraining on Ray: actors and a device, an edge that dies in its window, and one that is away for a round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification

from raycloud.jobs.versions import rollback
from raycloud.rounds.versions import VERSIONS, VersionStore
from tests.cluster.one_machine import in_a_process
from tests.retrain.in_process import DIGITS, recipe_of


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_version_advances_by_the_others_and_edges_catch_up(tmp_path: Path) -> None:
    recipe = recipe_of(
        DIGITS,
        output=str(tmp_path / "run"),
        edges=[
            {"name": "steady", "windows": ["invert", "noise", "contrast", "invert"]},
            {"name": "killed", "windows": ["source", "invert", "noise", "noise"]},
            {"name": "away", "windows": ["source", "noise", "invert", "contrast"]},
            {"name": "shop", "windows": ["noise", "source", "noise", "invert"], "device": True},
        ],
        rounds={"deadline_s": 60},
        test_samples=100,
    )
    seen = in_a_process("tests.cluster.one_retrain_device", recipe, tmp_path)
    rounds = [one for one in seen["metrics"] if one["kind"] == "round"]
    windows = [one for one in seen["metrics"] if one["kind"] == "window"]
    assert [one["window"] for one in rounds] == [0, 1, 2, 3]
    assert rounds[1]["missed"] == {"killed": "died"} and rounds[2]["missed"] == {"away": "late"}
    assert not rounds[0]["missed"] and not rounds[3]["missed"] and not any(one["refused"] for one in rounds)
    # The version advanced by the others, and those who were gone serve again.
    assert rounds[1]["members"] and rounds[2]["members"]
    assert {(one["edge"], one["window"]) for one in windows} >= {("killed", 2), ("away", 3), ("shop", 3)}
    started = next(one for one in windows if (one["edge"], one["window"]) == ("killed", 2))
    assert started["version"] == 2  # its new process began with the version that it had missed
    assert not any(one.get("over_budget") for one in windows)
    assert sum(bool(one.get("helped")) for one in windows if one["edge"] == "shop") >= 1
    assert seen["device"]["device"] == "shop" and len(seen["device"]["windows"]) == 4
    assert ViTForImageClassification.from_pretrained(seen["device"]["model"]).config.num_labels == 10
    # The model that the run writes is the newest version.
    store = VersionStore(tmp_path / "run" / VERSIONS)
    newest, model = store.weights(store.current), ViTForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(newest[name], one) for name, one in model.state_dict().items() if name in newest)
    assert (tmp_path / "run" / "report.html").is_file()
    # Rolled back, it is what the first round made.
    rollback(tmp_path / "run", 1)
    first, model = store.weights(1), ViTForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(first[name], one) for name, one in model.state_dict().items() if name in first)
