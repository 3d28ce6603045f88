"""A cluster of several nodes on this machine, and one run of the job that loses a node and gains another.

Run as ``python -m tests.cluster.one_machine RECIPE`` in a process of its own; the last line is what happened, as JSON.
The recipe's edges are "store" and "newsroom"; each node has room for one of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from raycloud.cluster.jobs import distill as job
from raycloud.distill.recipe import DistillRecipe

STORE = 100_000_000


def placed() -> dict[str, list[str]]:
    """The names of the nodes where the actors of each class are."""
    tiers = {node["NodeID"]: node["Labels"].get("name", "") for node in ray.nodes()}
    found: dict[str, list[str]] = {}
    for actor in actors().values():
        if actor["State"] == "ALIVE":
            found.setdefault(actor["ActorClassName"].split(".")[-1], []).append(tiers[actor["Address"]["NodeID"]])
    return {name: sorted(nodes) for name, nodes in found.items()}


def main(recipe: DistillRecipe) -> dict[str, Any]:
    """Remove an edge node in the middle of the second round, add another one before the third."""
    head = {"num_cpus": 1, "resources": {"cloud": 1}, "labels": {"tier": "cloud", "name": "head"}}
    cluster = Cluster(
        initialize_head=True, head_node_args={**head, "include_dashboard": False, "object_store_memory": STORE}
    )

    def edge(name: str) -> Any:
        labels = {"tier": "edge", "name": name}
        return cluster.add_node(num_cpus=1, resources={"edge": 1}, labels=labels, object_store_memory=STORE)

    nodes = {name: edge(name) for name in ("edge-a", "edge-b")}
    cluster.wait_for_nodes()
    cluster.connect()
    seen: dict[str, Any] = {}
    original = job.run_round

    def disturbed(number: int, index: int, members: Any, weights: Any, rounds: Any, watch: Any) -> Any:
        if index == 2 and "joined" not in seen:
            seen["joined"] = True
            edge("edge-c")

        def watching(beats: Any) -> None:
            watch(beats)
            if index == 1 and "removed" not in seen and "store" in beats:
                seen["before"] = placed()
                ours = next(member.actor for member in members if member.name == "store")
                where = actors(ours._actor_id.hex())["Address"]["NodeID"]
                name = next(node["Labels"]["name"] for node in ray.nodes() if node["NodeID"] == where)
                seen["removed"] = name
                cluster.remove_node(nodes[name], allow_graceful=False)
            if index == 2 and set(beats) == {"store", "newsroom"}:
                seen["after"] = placed()

        return original(number, index, members, weights, rounds, watching)

    job.run_round = disturbed  # type: ignore[assignment]
    try:
        seen["rounds"] = job.run(recipe).summary["rounds"]
    finally:
        ray.shutdown()
        cluster.shutdown()
    return seen


if __name__ == "__main__":
    print(json.dumps(main(DistillRecipe.load(Path(sys.argv[1])))), flush=True)
