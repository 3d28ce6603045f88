"""A device without Ray in a distillation beside two actors, over Ray Serve and a WebSocket."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cluster.one_machine import in_a_process
from tests.cluster.recipes import small

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
        rounds={"count": 3, "steps": 60, "deadline_s": 400, "rejoin_s": 300},
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
