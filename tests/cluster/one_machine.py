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

from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.distill.recipe import DistillRecipe
from raycloud.jobs import distill, tune_teacher
from raycloud.jobs.registry import load_recipe
from raycloud.recipe import Recipe

ROOT = Path(__file__).parents[2]
STORE = 100_000_000


class Nodes:
    """Cluster with nodes by name; the head node has one CPU."""

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
    """List the names of the nodes with actors, by class."""
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

    def disturbed(
        number: int, index: int, members: Any, weights: Any, rounds: Any, on_progress: Any, *gates: Any
    ) -> Any:
        if index == 2 and "joined" not in seen:
            seen["joined"] = True
            cluster.add("edge", "edge-c")

        def watching(heartbeats: Any) -> None:
            on_progress(heartbeats)
            if index == 1 and "removed" not in seen and "store" in heartbeats:
                os.kill(heartbeats["store"].pid, signal.SIGSTOP)  # a round may be over sooner than a node
                seen["before"] = placed()
                ours = next(member.actor for member in members if member.name == "store")
                where = actors(ours._actor_id.hex())["Address"]["NodeID"]
                name = next(node["Labels"]["name"] for node in ray.nodes() if node["NodeID"] == where)
                seen["removed"] = name
                cluster.remove(name)
                with suppress(ProcessLookupError):
                    os.kill(heartbeats["store"].pid, signal.SIGKILL)
            if index == 2 and set(heartbeats) == {"store", "newsroom"}:
                seen["after"] = placed()

        return original(number, index, members, weights, rounds, watching, *gates)

    distill.run_round = disturbed  # type: ignore[assignment]
    try:
        seen["rounds"] = distill.run(recipe)["rounds"]
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
    original = tune_teacher._TuneTeacherRun._write

    def watched(self: Any, record: dict[str, Any]) -> None:
        original(self, record)
        if record["kind"] == "start":
            pids.append(record["pid"])
            seen["after" if frozen.is_set() else "before"] = placed()["RayTrainWorker"]
        if record["kind"] == "step" and record["step"] == 5 and not frozen.is_set():
            os.kill(pids[0], signal.SIGSTOP)  # a step is over sooner than a node
            frozen.set()

    tune_teacher._TuneTeacherRun._write = watched  # type: ignore[method-assign]
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
            seen["summary"] = run.result()
        finally:
            cluster.end()
    return seen


def on_one_machine(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Run a job on several nodes, in a process of its own, and report what happened."""
    return in_a_process("tests.cluster.one_machine", recipe, folder)


def in_a_process(module: str, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Run a module of tests with a recipe in a process of its own, and return what it prints.

    Args:
        module: name of the module.
        recipe: recipe of the run.
        folder: folder for files, and home of the process.
    """
    path = folder / "recipe.yaml"
    path.write_text(recipe.dump())
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", module, str(path)],
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
