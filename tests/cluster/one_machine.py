"""A cluster of several nodes on this machine, and one run of a job that loses a node and gains another.

Each node has room for one student or one worker. A distillation's edges are "store" and "newsroom".
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from raycloud.cli.recipes import load_recipe
from raycloud.cluster.jobs import distill, tune_teacher
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.distill.recipe import DistillRecipe
from raycloud.recipe import Recipe

ROOT = Path(__file__).parents[2]
STORE = 100_000_000


class Nodes:
    """Nodes by name; the head has one CPU."""

    def __init__(self, **resources: float) -> None:
        head = {"num_cpus": 1, "resources": resources, "labels": {"tier": "cloud", "name": "head"}}
        self._cluster = Cluster(
            initialize_head=True, head_node_args={**head, "include_dashboard": False, "object_store_memory": STORE}
        )
        self._nodes: dict[str, Any] = {}

    def add(self, tier: str, name: str) -> None:
        self._nodes[name] = self._cluster.add_node(
            num_cpus=1, resources={tier: 1}, labels={"tier": tier, "name": name}, object_store_memory=STORE
        )

    def remove(self, name: str) -> None:
        self._cluster.remove_node(self._nodes[name], allow_graceful=False)

    def connect(self) -> None:
        self._cluster.wait_for_nodes()
        self._cluster.connect()

    def end(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()


def placed() -> dict[str, list[str]]:
    """The names of the nodes where the actors of each class are."""
    names = {node["NodeID"]: node["Labels"].get("name", "") for node in ray.nodes()}
    found: dict[str, list[str]] = {}
    for actor in actors().values():
        if actor["State"] == "ALIVE":
            found.setdefault(actor["ActorClassName"].split(".")[-1], []).append(names[actor["Address"]["NodeID"]])
    return {name: sorted(nodes) for name, nodes in found.items()}


def lose_an_edge(recipe: DistillRecipe) -> dict[str, Any]:
    """Remove an edge node in the middle of the second round, add another one before the third."""
    cluster = Nodes(cloud=1)
    for name in ("edge-a", "edge-b"):
        cluster.add("edge", name)
    cluster.connect()
    seen: dict[str, Any] = {}
    original = distill.run_round

    def disturbed(number: int, index: int, members: Any, weights: Any, rounds: Any, watch: Any) -> Any:
        if index == 2 and "joined" not in seen:
            seen["joined"] = True
            cluster.add("edge", "edge-c")

        def watching(beats: Any) -> None:
            watch(beats)
            if index == 1 and "removed" not in seen and "store" in beats:
                seen["before"] = placed()
                ours = next(member.actor for member in members if member.name == "store")
                where = actors(ours._actor_id.hex())["Address"]["NodeID"]
                name = next(node["Labels"]["name"] for node in ray.nodes() if node["NodeID"] == where)
                seen["removed"] = name
                cluster.remove(name)
            if index == 2 and set(beats) == {"store", "newsroom"}:
                seen["after"] = placed()

        return original(number, index, members, weights, rounds, watching)

    distill.run_round = disturbed  # type: ignore[assignment]
    try:
        seen["rounds"] = distill.run(recipe).summary["rounds"]
    finally:
        cluster.end()
    return seen


def lose_a_worker(recipe: TuneTeacherRecipe) -> dict[str, Any]:
    """Remove the node of the first worker after the fifth step; add another one when the cluster has noticed that."""
    cluster = Nodes()
    for name in ("cloud-a", "cloud-b"):
        cluster.add("cloud", name)
    cluster.connect()
    seen: dict[str, Any] = {}
    pids: list[int] = []
    frozen = threading.Event()
    original = tune_teacher._Run._write

    def watched(self: Any, record: dict[str, Any]) -> None:
        original(self, record)
        if record["kind"] == "start":
            pids.append(record["pid"])
            seen["after" if frozen.is_set() else "before"] = placed()["RayTrainWorker"]
        if record["kind"] == "step" and record["step"] == 5 and not frozen.is_set():
            os.kill(pids[0], signal.SIGSTOP)  # a step is over sooner than a node
            frozen.set()

    tune_teacher._Run._write = watched  # type: ignore[method-assign]
    # Nodes are added in the main thread, so the job has another one.
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(tune_teacher.run, recipe)
        try:
            while not frozen.wait(1):
                if run.done():
                    run.result()
            where = next(one["Address"]["NodeID"] for one in actors().values() if one["Pid"] == pids[0])
            seen["removed"] = next(node["Labels"]["name"] for node in ray.nodes() if node["NodeID"] == where)
            cluster.remove(seen["removed"])
            with suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
            while ray.cluster_resources()["cloud"] > 1:
                time.sleep(0.2)
            cluster.add("cloud", "cloud-c")
            seen["summary"] = run.result().summary
        finally:
            cluster.end()
    return seen


def on_one_machine(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What happened to a run, in a process of its own.

    Args:
        recipe: of the run.
        folder: for files, and the process's home.
    """
    path = folder / "recipe.yaml"
    path.write_text(recipe.dump())
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.one_machine", str(path)],
        env={**env, "HOME": str(folder), "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def main(path: Path) -> dict[str, Any]:
    recipe = load_recipe(path)
    if isinstance(recipe, TuneTeacherRecipe):
        return lose_a_worker(recipe)
    assert isinstance(recipe, DistillRecipe)
    return lose_an_edge(recipe)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
