"""A real cloud for benchmarks: Ray and Serve on this machine, the middle of a model in a replica of its own."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from ray import serve

from raycloud.benchmarks.measure import SMOLLM2
from raycloud.edge.cloud import Cloud
from raycloud.models.loading import load
from raycloud.report.console import console, working
from raycloud.serving.split import SplitSettings, app
from raycloud.split.calibration import Calibration, calibrate
from raycloud.split.passages import passages

_TEXT = 4096


def calibrated(first: int, second: int, folder: Path) -> Path:
    """SmolLM2's codecs at two cuts, fitted to a little real text, as a file."""
    with working("calibrating"):
        loaded = load(SMOLLM2, device="cpu", dtype="float32", notify=console.print)
        texts = passages(["builtin:instruct", "builtin:reviews"], "train", loaded.tokenizer, _TEXT)
        made: Calibration = calibrate(loaded.model, texts, {first, second})
    path = folder / "calibration.safetensors"
    made.save(path)
    return path


@contextmanager
def local_cloud(settings: SplitSettings) -> Iterator[Cloud]:
    """Ray, Serve and the split application for the time of a benchmark."""
    with served(app(settings)) as url:
        yield Cloud(f"{url}/v1/split", settings.tokens[0])


@contextmanager
def served(application: serve.Application) -> Iterator[str]:
    """Ray, Serve and an application for the time of a benchmark; where its WebSockets are, ``ws://host:port``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A private Ray for the time of the benchmark: nobody else can reach it, and no token file is left behind.
    before = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with working("starting Ray Serve"):
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=256 * 2**20,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
            serve.run(application, name="cloud", route_prefix="/")
        except BaseException:
            ray.shutdown()
            raise
    try:
        yield f"ws://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        if before is None:
            del os.environ["RAY_AUTH_MODE"]
        else:
            os.environ["RAY_AUTH_MODE"] = before


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the time of a benchmark."""
    with TemporaryDirectory(prefix="raycloud-bench-") as folder:
        yield Path(folder)
