"""Windows of a whole job: alarms for each domain, budgets that hold, versions on disk, labels that are not read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raycloud.models.weights import weights_of
from raycloud.retrain.cloud_run import CloudRun
from raycloud.rounds.versions import VERSIONS, VersionStore
from tests.retrain.in_process import DIGITS, recipe_of, run_windows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the trained source model."""
    folder = tmp_path_factory.mktemp("source")
    CloudRun(recipe_of(DIGITS), folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "run"))


def test_alarms_are_raised_once_for_each_domain_and_windows_keep_to_the_budget(folder: Path) -> None:
    windows = ["source", "invert", "invert", "noise", "source"]
    recipe = recipe_of(DIGITS, edges=[{"name": "a", "windows": windows}])
    cloud, edges, records = run_windows(recipe, folder)
    assert [record["cause"] for record in records] == [None, "hidden_states", None, "hidden_states", "hidden_states"]
    answered = [record for record in records if record["cause"]]
    for record in answered:
        assert not record["over_budget"]
        for name, paid in record["paid"].items():
            assert paid <= (record["budget"][name] or float("inf"))
    inverted = records[1]
    assert inverted["helped"] and inverted["test_after"] < inverted["test_before"] - 0.1
    assert records[2]["test_before"] <= inverted["test_after"] + 0.01  # the version is what the only edge trained
    store = VersionStore(folder / VERSIONS)
    helped = [record["window"] + 1 for record in answered if record["helped"]]
    assert [one.round for one in store.records()] == [None, *helped]
    # The source is known from the beginning: the edge is back at it bit for bit, if training did not improve it.
    assert records[4]["recalled"] and records[4]["test_after"] <= records[0]["test_before"] + 0.02
    own, newest, first = weights_of(edges["a"].model), store.weights(store.current), store.weights(0)
    close = [torch.allclose(own[name], one, atol=1e-5) for name, one in first.items()]
    assert all(close) == (not records[4]["helped"])
    # Another process goes on with the newest version.
    again = CloudRun(recipe, folder)
    assert again.facts().rounds == helped[-1]
    assert again.facts().source_error == pytest.approx(cloud.facts().source_error)
    whole = again.deployment(None).weights
    assert all(torch.equal(whole[name], one) for name, one in newest.items())


def test_the_only_edge_trains_the_next_version(folder: Path) -> None:
    recipe = recipe_of(DIGITS, edges=[{"name": "a", "windows": ["source", "invert"]}])
    _, edges, records = run_windows(recipe, folder)
    assert records[1]["helped"] and not records[1]["recalled"]
    own, newest = weights_of(edges["a"].model), VersionStore(folder / VERSIONS).weights(1)
    assert all(torch.allclose(own[name], one, atol=1e-6) for name, one in newest.items())


@pytest.mark.parametrize("mode", ["suggest", "dry_run"])
def test_without_keeping_nothing_changes(folder: Path, mode: str) -> None:
    recipe = recipe_of(DIGITS, mode=mode, edges=[{"name": "a", "windows": ["invert"]}])
    _, edges, (record,) = run_windows(recipe, folder)
    assert record["cause"] == "hidden_states" and record["steps"] and record["predicted_error"] < record["error"]
    assert ("helped" in record) == (mode == "dry_run")
    assert record["test_after"] == record["test_before"]
    start = VersionStore(folder / VERSIONS)
    assert start.current == 0
    own = weights_of(edges["a"].model)
    assert all(torch.equal(own[name], one) for name, one in start.weights(0).items())


def test_changed_labels_are_noticed_by_errors_alone(folder: Path) -> None:
    recipe = recipe_of(DIGITS, edges=[{"name": "a", "windows": ["source", "relabel", "relabel"]}])
    _, _, records = run_windows(recipe, folder)
    assert [record["cause"] for record in records] == [None, "errors", None]
    assert records[1]["test_after"] < records[1]["test_before"] - 0.1


@pytest.mark.parametrize(("share", "replay"), [(0.7, 0.0), (0.45, 0.0), (0.2, 0.0), (0.7, 0.25)])
def test_estimates_and_training_fit_into_little_memory(folder: Path, share: float, replay: float) -> None:
    budget, training = {"full_steps": 30, "memory_share": share}, {"replay": replay}
    recipe = recipe_of(DIGITS, budget=budget, training=training, edges=[{"name": "a", "windows": ["invert"]}])
    _, _, (record,) = run_windows(recipe, folder)
    assert not record["over_budget"] and record["paid"]["memory"] <= record["budget"]["memory"]
    assert record["paid"]["flops"] <= record["budget"]["flops"]
    assert record["steps"] > 0 or share == 0.2


def test_a_schedule_and_a_cool_down(folder: Path) -> None:
    windows = ["invert", "noise", "noise", "noise"]
    drift = {"every": 2, "cool_down": 1}
    recipe = recipe_of(DIGITS, drift=drift, edges=[{"name": "a", "windows": windows}])
    _, _, records = run_windows(recipe, folder)
    assert [record["cause"] for record in records] == ["hidden_states", None, "hidden_states", None]


def test_a_gain_that_is_too_small_trains_nothing(folder: Path) -> None:
    recipe = recipe_of(DIGITS, least_gain=0.99, edges=[{"name": "a", "windows": ["invert"]}])
    _, _, (record,) = run_windows(recipe, folder)
    assert record["cause"] and record["steps"] == 0 and record["trained"] == []


def test_a_version_that_is_worse_in_the_edges_domain_is_not_taken(folder: Path) -> None:
    edges: list[dict[str, Any]] = [
        {"name": "a", "windows": ["source", "source"]},
        {"name": "b", "windows": ["invert", "invert"]},
    ]
    cloud, runs, records = run_windows(recipe_of(DIGITS, edges=edges), folder)
    assert cloud.facts().rounds == 1 and runs["b"].version == 1
    first, second = (record for record in records if record["edge"] == "a")
    assert second["test_before"] <= first["test_before"] + 0.01
