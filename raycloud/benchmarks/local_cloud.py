"""Cloud for benchmarks: Ray, Ray Serve and an application with its replicas on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from ray import serve

from raycloud.benchmarks.measure import SMOLLM2
from raycloud.models.loading import load
from raycloud.report.console import console, timed
from raycloud.split.calibration import Calibration, calibrate
from raycloud.split.calibration_texts import load_calibration_texts

TEXT = 4096
"""Number of tokens on which codecs are calibrated."""
_NAME = "cloud"


def calibrated(start_block: int, end_block: int, folder: Path, tokens: int = TEXT) -> Path:
    """Calibrate SmolLM2's codecs at two cuts on real text; return the path of the calibration file."""
    with timed("calibrating"):
        loaded = load(SMOLLM2, device="cpu", dtype="float32", notify=console.print)
        texts = load_calibration_texts(["builtin:instruct", "builtin:reviews"], "train", loaded.tokenizer, tokens)
        made: Calibration = calibrate(loaded.model, texts, {start_block, end_block})
    path = folder / "calibration.safetensors"
    made.save(path)
    return path


@dataclass(frozen=True)
class ServedApplication:
    """Application on Ray Serve, with the address of its WebSockets: ``ws://host:port``."""

    application: serve.Application
    url: str

    def deploy(self) -> None:
        """Deploy the application; return when it accepts requests."""
        serve.run(self.application, name=_NAME, route_prefix="/")

    def undeploy(self) -> None:
        """Delete the application; return when its replicas have stopped."""
        serve.delete(_NAME)

    def kill_replicas(self) -> int:
        """Kill the processes of the replicas without a graceful shutdown; return their number."""
        named = ray.util.list_named_actors(all_namespaces=True)
        replicas = [one for one in named if one["name"].startswith(f"SERVE_REPLICA::{_NAME}#")]
        for one in replicas:
            ray.kill(ray.get_actor(one["name"], namespace=one["namespace"]), no_restart=True)
        return len(replicas)


@contextmanager
def no_token_auth() -> Iterator[None]:
    """Disable token authentication for Ray started inside, which only this machine can reach; leaves no token file."""
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_AUTH_MODE"]
        else:
            os.environ["RAY_AUTH_MODE"] = before


@contextmanager
def served(application: serve.Application) -> Iterator[ServedApplication]:
    """Run Ray, Ray Serve and an application during the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = ServedApplication(application, f"ws://127.0.0.1:{port}")
    # Progress messages of Serve would hide the benchmark's table.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with no_token_auth():
        try:
            with timed("starting Ray Serve"):
                ray.init(
                    address="local",
                    num_cpus=4,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=256 * 2**20,
                )
                serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
                running.deploy()
            yield running
            # Not serve.shutdown(): Serve's controller dies during that call, which Ray reports on stdout.
            running.undeploy()
        finally:
            ray.shutdown()


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a temporary folder for the block."""
    with TemporaryDirectory(prefix="raycloud-bench-") as folder:
        yield Path(folder)
