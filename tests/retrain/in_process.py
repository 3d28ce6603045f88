"""Job of retraining in one process, without Ray or a link: the cloud, its edges, and their windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raycloud.retrain.cloud_run import CloudRun
from raycloud.retrain.deployment import Deployment
from raycloud.retrain.edge_run import EdgeRun, Record
from raycloud.retrain.recipe import RetrainRecipe

DIGITS_MODEL = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
DIGITS = {
    "model": DIGITS_MODEL,
    "task": "classification",
    "data": {"source": "builtin:digits", "source_domain": "source"},
    "source": {"steps": 150, "batch_size": 64, "lr": 3e-3},
    "samples": 100,
    "budget": {"full_steps": 30},
    "threads": 1,
    "edges": [{"name": "a", "windows": ["source", "invert"]}],
}


def recipe_of(base: dict[str, Any], **changes: Any) -> RetrainRecipe:
    """Recipe of plain values, some of them changed."""
    return RetrainRecipe.parse({**base, **changes})


def run_windows(recipe: RetrainRecipe, folder: Path) -> tuple[CloudRun, dict[str, EdgeRun], list[Record]]:
    """Run all windows of all edges, and return the cloud, the edges, and the records of windows."""
    torch.set_num_threads(1)
    cloud = CloudRun(recipe, folder)
    edges = {edge.name: EdgeRun(recipe, edge, over_tensors(cloud.deployment(None))) for edge in recipe.edges}
    records = []
    for number in range(recipe.windows):
        cloud.open(number + 1, [edge.name for edge in recipe.edges if number < len(edge.windows)])
        for edge in recipe.edges:
            if number < len(edge.windows):
                records.append(serve(cloud, edges[edge.name], edge.name, number))
        closed = cloud.close()
        assert closed is not None
        for run in edges.values():
            run.adopt(over_tensors(cloud.deployment(run.version, run.changed)))
    json.dumps(records)  # they go to a file
    return cloud, edges, records


def serve(cloud: CloudRun, edge: EdgeRun, name: str, number: int) -> Record:
    """Serve one window of an edge in the open round."""
    seen = edge.observe(number, over_tensors(cloud.deployment(edge.version, edge.changed)))
    if seen.report is None:
        cloud.remove(name)
        return seen.record
    done = edge.retrain(cloud.plan(seen.report))
    cloud.settle(name, done.recalled)
    if done.update is None:
        cloud.remove(name)
    else:
        assert cloud.accept(name, number + 1, done.update, seen.report.signature) is None
    return seen.record | done.record


def over_tensors(state: Deployment) -> Deployment:
    """State as a device gets it."""
    return Deployment.from_tensors(state.tensors())
