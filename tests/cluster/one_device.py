"""A distillation of two actors and a device without Ray, which is killed in the middle of a round and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from safetensors.torch import save_file

from raycloud.distill.recipe import DistillRecipe
from raycloud.jobs import distill
from raycloud.jobs.registry import load_recipe
from raycloud.rounds.aggregators import mean
from raycloud.rounds.contribution import Contribution
from raycloud.serving.rounds import RoundsSettings, app
from tests.ports import free_port

TOKEN = "s3cret"
# Without ray a device must do: whoever imports it there fails.
WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from raycloud.cli.app import main; main()"


class Device:
    """Process of the device."""

    def __init__(self, port: int, folder: Path, *, data: str = "builtin:reviews", allow: str = "--send-tokens") -> None:
        self._port, self._folder, self._starts = port, folder, 0
        self._data, self._allow = data, allow
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._starts += 1
        cloud = f"ws://127.0.0.1:{self._port}/v1/rounds"
        options = ["--cloud", cloud, "--job", "run", "--data", self._data, self._allow, "--threads", "1"]
        options += ["--folder", str(self._folder / "device"), "--json"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITHOUT_RAY, "edge", "learn", *options],
            env={**os.environ, "RAYCLOUD_TOKEN": TOKEN},
            stdout=subprocess.PIPE,
            stderr=(self._folder / f"device-{self._starts}.log").open("w"),
            text=True,
        )

    def kill(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def summary(self) -> dict[str, Any]:
        assert self.process is not None
        found: dict[str, Any] = json.loads(self.process.communicate(timeout=120)[0].splitlines()[-1])
        return found


def with_a_device(recipe: DistillRecipe, folder: Path) -> dict[str, Any]:
    """Run a job; the device is killed at its first step of the second round that is heard of."""
    ray.init(num_cpus=4, resources={"cloud": 1, "edge": 2}, include_dashboard=False, object_store_memory=200_000_000)
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(app(RoundsSettings(token=TOKEN)), name="rounds")
    device, original = Device(port, folder), distill.run_round
    seen: dict[str, Any] = {"rounds": [], "means": []}

    def disturbed(
        number: int, index: int, members: Any, rounds: Any, options: Any, on_progress: Any, *gates: Any
    ) -> Any:
        if device.process is None:
            device.start()

        def watching(heartbeats: Any) -> None:
            on_progress(heartbeats)
            if index == 1 and "killed" not in seen and "shop" in heartbeats:
                seen["killed"] = [heartbeats["shop"].step, options.steps]
                device.kill()
                device.start()

        done = original(number, index, members, rounds, options, watching, *gates)
        (machine,) = rounds.values()
        expected = mean([Contribution(one.weights, one.tokens) for one in done.answers])
        seen["means"].append(all(torch.equal(machine.weights[name], tensor) for name, tensor in expected.items()))
        seen["rounds"].append([one.name for one in done.answers])
        save_file({name: tensor.contiguous() for name, tensor in machine.weights.items()}, folder / "last.safetensors")
        return done

    distill.run_round = disturbed  # type: ignore[assignment]
    try:
        seen["missed"] = distill.run(recipe)["missed"]
        seen["device"] = device.summary()
    finally:
        if device.process is not None and device.process.poll() is None:
            device.process.kill()
        serve.shutdown()
        ray.shutdown()
    return seen


def main(path: Path) -> dict[str, Any]:
    recipe = load_recipe(path)
    assert isinstance(recipe, DistillRecipe)
    return with_a_device(recipe, path.parent)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
