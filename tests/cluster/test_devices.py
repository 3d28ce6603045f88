"""A device without Ray beside actors in a distillation and in a split fine-tuning, over Ray Serve and a WebSocket."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.one_machine import in_a_process
from tests.cluster.recipes import small, split_edges

EDGES = [
    {"name": "store", "where": {"domain": ["movie", "product"]}},
    {"name": "newsroom", "where": {"domain": ["news", "tweet"]}},
    {"name": "shop", "device": True},
]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_device_takes_part_beside_actors_and_comes_back_after_a_kill(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = small(
        tiny_llama,
        tmp_path / "run",
        edges=EDGES,
        data={"limit": 400},
        rounds={"count": 3, "steps": 30, "deadline_s": 400, "rejoin_s": 300},
    )
    seen = in_a_process("tests.cluster.one_device", recipe, tmp_path)
    step, steps = seen["killed"]
    assert 0 < step < steps
    assert seen["rounds"] == [["newsroom", "shop", "store"]] * 3 and not seen["missed"]
    assert seen["means"] == [True] * 3
    assert seen["device"]["device"] == "shop" and seen["device"]["rounds"][-1]["accepted"]
    # What the run keeps, and what the device got in the end, are the mean of the last contributions.
    last = load_file(tmp_path / "last.safetensors")
    for folder in (tmp_path / "run" / "student", Path(seen["device"]["student"])):
        kept = load_file(folder / "model.safetensors")
        assert all(torch.equal(last[name], tensor) for name, tensor in kept.items())


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_device_fine_tunes_beside_an_actor_and_comes_back_after_a_kill(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = split_edges(
        tiny_llama,
        tmp_path / "run",
        edges=[{"name": "store", "where": {"domain": ["product"]}}, {"name": "shop", "device": True}],
        rounds={"count": 3, "steps": 8, "deadline_s": 240},
        checkpoint_every=2,
    )
    seen = in_a_process("tests.cluster.one_split_device", recipe, tmp_path)
    assert seen["killed"] >= 3
    rounds = seen["summary"]["rounds"]
    assert [one["round"] for one in rounds] == [1, 2, 3]
    assert all(sorted(one["members"]) == ["shop", "store"] and not one["missed"] for one in rounds)
    assert all(seen["summary"]["edges"][name]["together"] for name in ("store", "shop"))
    assert seen["device"]["device"] == "shop" and seen["device"]["counted"] >= 3
    # The device ends with the weights that all edges share.
    group = load_file(tmp_path / "run" / "group.safetensors")
    shared = {name.removeprefix("edge/"): tensor for name, tensor in group.items() if name.startswith("edge/")}
    mine = load_file(seen["device"]["weights"])
    assert shared and all(torch.equal(mine[name], tensor) for name, tensor in shared.items())
