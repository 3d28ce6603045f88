"""Recipes small enough to be killed many times: random models of four narrow blocks, real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raycloud.distill.recipe import DistillRecipe
from raycloud.split.finetune.recipe import SplitTuneRecipe


def small(teacher: Path, output: Path, /, **changes: Any) -> DistillRecipe:
    """Recipe with two edges and three rounds of three steps; a round takes about a second."""
    values: dict[str, Any] = {
        "output": str(output),
        "device": "cpu",
        "threads": 1,
        "teacher": {"model": str(teacher), "placement": {"num_cpus": 0.1}},
        "student": {"blocks": 2, "calibration": 8, "placement": {"num_cpus": 0.1}},
        "data": {"max_length": 24, "limit": 400},  # every start of a student tokenises all rows
        "edges": [
            {"name": "store", "where": {"domain": ["movie", "product"]}},
            {"name": "newsroom", "where": {"domain": ["news", "tweet"]}},
        ],
        "training": {"batch_size": 8, "lr": 1e-2},
        "rounds": {"count": 3, "steps": 3, "deadline_s": 280},
        "evaluation": {"held_out_samples": 8, "prompts": ["The film"], "max_new_tokens": 2},
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return DistillRecipe.model_validate(values)


def split_edges(model: Path, output: Path, /, **changes: Any) -> SplitTuneRecipe:
    """Recipe with two edges of two domains, and three rounds of two steps."""
    return SplitTuneRecipe.parse(
        {
            "output": str(output),
            "model": str(model),
            "start_block": 1,
            "end_block": 3,
            "task": {"kind": "language", "max_prompt_length": 80},
            "data": {"source": "builtin:instruct", "max_length": 96, "limit": 24, "held_out_samples": 4},
            "uplink": {"kind": "low_rank", "rank": 6, "dtype": "int8"},
            "training": {"lr": 5e-3, "batch_size": 4},
            "checkpoint_every": 3,
            "device": "cpu",
            "threads": 1,
            "edges": [
                {"name": "store", "where": {"domain": ["product"]}},
                {"name": "newsroom", "where": {"domain": ["news"]}},
            ],
            "rounds": {"count": 3, "steps": 2, "deadline_s": 240},
            "cloud_placement": {"num_cpus": 0.1},
            "edge_placement": {"num_cpus": 0.1},
            **changes,
        }
    )
