"""A split fine-tuning of an actor and a device without Ray, which is killed while it trains and started again."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve

from raycloud.jobs import split_tune
from raycloud.jobs.registry import load_recipe
from raycloud.results import read_records
from raycloud.serving.rounds import RoundsSettings, app
from raycloud.split.finetune.recipe import SplitTuneRecipe
from tests.cluster.one_device import TOKEN, Device
from tests.ports import free_port


def killed_in_training(device: Device, folder: Path, seen: dict[str, Any], over: threading.Event) -> None:
    """Kill the device once it has trained some steps with the others, and start it again."""
    while not over.is_set():
        for records in folder.glob("device/*/together.jsonl"):
            steps = [record for record in read_records(records) if record["kind"] == "step"]
            if len(steps) >= 3:
                device.kill()
                seen["killed"] = len(steps)
                device.start()
                return
        time.sleep(0.05)


def with_a_device(recipe: SplitTuneRecipe, folder: Path) -> dict[str, Any]:
    """Run a job with one actor and one device."""
    ray.init(num_cpus=4, resources={"cloud": 1, "edge": 1}, include_dashboard=False, object_store_memory=200_000_000)
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(RoundsSettings(token=TOKEN)), name="rounds")
    device = Device(port, folder, data="builtin:instruct", allow="--send-hidden")
    seen: dict[str, Any] = {}
    over = threading.Event()
    killer = threading.Thread(target=killed_in_training, args=(device, folder, seen, over), daemon=True)
    started, original = [False], split_tune._SplitTuneJob._all

    def disturbed(job: Any, what: Any, edges: Any) -> None:
        if not started[0]:
            started[0] = True
            device.start()
            killer.start()
        original(job, what, edges)

    split_tune._SplitTuneJob._all = disturbed  # type: ignore[method-assign]
    try:
        seen["summary"] = split_tune.run(recipe)
        seen["device"] = device.summary()
    finally:
        over.set()
        if device.process is not None and device.process.poll() is None:
            device.process.kill()
        serve.shutdown()
        ray.shutdown()
    return seen


def main(path: Path) -> dict[str, Any]:
    recipe = load_recipe(path)
    assert isinstance(recipe, SplitTuneRecipe)
    return with_a_device(recipe, path.parent)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
