"""Block retraining of three actors and a device; one actor is killed in its window, one is away for a round."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
from ray import serve

from raycloud.jobs import retrain
from raycloud.jobs.registry import load_recipe
from raycloud.results import read_records
from raycloud.retrain.recipe import RetrainRecipe
from raycloud.serving.rounds import RoundsSettings, app
from tests.cluster.one_device import TOKEN, Device
from tests.ports import free_port

KILLED, AWAY = ("killed", 1), ("away", 2)
"""Name of the edge that is disturbed, and number of the window."""


def process_of(folder: Path, edge: str) -> int:
    """Process of an edge's actor, from the log of the run."""
    lines = [one for one in read_records(folder / "log.jsonl") if one["source"] == f"edge {edge}"]
    return int(next(one for one in reversed(lines) if "process" in one["message"])["message"].rpartition(" ")[2])


def with_disturbances(recipe: RetrainRecipe, folder: Path) -> dict[str, Any]:
    """Run a job with three actors and a device."""
    ray.init(num_cpus=4, resources={"cloud": 1, "edge": 3}, include_dashboard=False, object_store_memory=200_000_000)
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(RoundsSettings(token=TOKEN)), name="rounds")
    device = Device(port, folder, data="builtin:digits", allow="--max-bytes=100MB")
    original, record = retrain._RetrainJob._window, retrain._RetrainJob._record
    stopped: list[int] = []
    run = Path(recipe.output)

    def window(job: Any, number: int, edges: Any) -> None:
        if number == 0:
            device.start()
        name, when = KILLED
        if number == when:  # the call waits in the process that dies
            os.kill(process_of(run, name), signal.SIGSTOP)
            stopped.append(process_of(run, name))
        name, when = AWAY
        if number == when:
            os.kill(process_of(run, name), signal.SIGSTOP)
            stopped.append(process_of(run, name))
        original(job, number, edges)

    def recorded(job: Any, done: Any, *closed: Any, **about: Any) -> None:
        while stopped:
            os.kill(stopped.pop(), signal.SIGCONT)
        record(job, done, *closed, **about)

    def took(job: Any, ref: Any, edge: Any, done: Any) -> None:
        take(job, ref, edge, done)
        if done.number == KILLED[1] and stopped:  # another edge has finished: this one dies in its window
            os.kill(stopped.pop(), signal.SIGKILL)

    take = retrain._RetrainJob._take
    retrain._RetrainJob._window = window  # type: ignore[method-assign]
    retrain._RetrainJob._record = recorded  # type: ignore[method-assign]
    retrain._RetrainJob._take = took  # type: ignore[method-assign]
    seen: dict[str, Any] = {}
    try:
        seen["summary"] = retrain.run(recipe)
        seen["device"] = device.summary()
        seen["metrics"] = read_records(run / "metrics.jsonl")
    finally:
        if device.process is not None and device.process.poll() is None:
            device.process.kill()
        serve.shutdown()
        ray.shutdown()
    return seen


def main(path: Path) -> dict[str, Any]:
    recipe = load_recipe(path)
    assert isinstance(recipe, RetrainRecipe)
    return with_disturbances(recipe, path.parent)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
