"""Records, weights and TensorBoard curves of a distillation's result directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def records(path: Path, kind: str) -> list[dict[str, Any]]:
    """Read the records of one kind from ``metrics.jsonl``."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return weights_in(path / "student")


def events(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Read the points that TensorBoard shows, by curve and tag."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for folder in (path / "tensorboard").iterdir():
        read = EventAccumulator(str(folder)).Reload()
        found[folder.name] = {
            tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]
        }
    return found


def logged(path: Path, student: str, key: str) -> list[tuple[int, float]]:
    """Read the points of one quantity of a student's steps from ``metrics.jsonl``."""
    steps = [record for record in records(path, "step") if record["student"] == student]
    return [(step["step"], pytest.approx(step[key], rel=1e-6)) for step in steps]
