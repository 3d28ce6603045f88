"""A distillation small enough to be killed many times: a random teacher of four narrow blocks, real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raycloud.distill.recipe import DistillRecipe


def small(teacher: Path, output: Path, /, **changes: Any) -> DistillRecipe:
    """Two edges, three rounds of three steps; about a second a round."""
    values: dict[str, Any] = {
        "output": str(output),
        "device": "cpu",
        "threads": 1,
        "teacher": {"model": str(teacher), "placement": {"num_cpus": 0.1}},
        "student": {"blocks": 2, "calibration": 8, "placement": {"num_cpus": 0.1}},
        "data": {"max_length": 24},
        "edges": [
            {"name": "store", "where": {"domain": ["movie", "product"]}},
            {"name": "newsroom", "where": {"domain": ["news", "tweet"]}},
        ],
        "training": {"batch_size": 8, "lr": 1e-2},
        "rounds": {"count": 3, "steps": 3, "deadline_s": 120},
        "evaluation": {"samples": 8, "prompts": ["The film"], "new_tokens": 2},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return DistillRecipe.model_validate(values)
