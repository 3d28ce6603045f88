"""Shared fixtures: a temporary home with the real cache, a tiny model with a real tokenizer, one Ray session."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything reads them. Ray leaves files in the home of whoever runs it; the cache of built-ins stays the user's.
os.environ.setdefault("RAYCLOUD_CACHE", str(Path.home() / ".cache" / "raycloud"))
os.environ["HOME"] = tempfile.mkdtemp(prefix="raycloud-home-")
os.environ["RAY_AUTH_MODE"] = "disabled"
# Ray's workers would have to wait for the tests that run beside them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
# Ray would kill workers for the memory that all programs of the machine take.
os.environ["RAY_memory_monitor_refresh_ms"] = "0"  # noqa: SIM112
os.environ.pop("RAY_ADDRESS", None)
# A command without an address joins the Ray that it finds in this folder: it may not be another test process's.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="rt-")  # short, for sockets
os.environ["HF_HUB_OFFLINE"] = "1"
# What the tests start computes in one thread, as they do: two processes beside each other have two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from xdist.scheduler import LoadScopeScheduling

# A shell's background job ignores Ctrl-C, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tiny models gain nothing from a second thread, and on a busy machine threads wait for one another at every operation.
torch.set_num_threads(1)


RAY = ("tests/cluster/", "tests/jobs/", "tests/search/", "tests/serving/")
LONG = (
    "tests/benchmarks/test_quick.py",
    "tests/cluster/test_every_type.py",
    "tests/cluster/test_ray_cluster.py",
    "tests/jobs/test_tune_teacher.py",
    "tests/cluster/teacher/test_equality.py",
    "tests/test_demo.py",
)
"""Files whose slow tests take minutes, the longest first."""


class Together(LoadScopeScheduling):
    """Under ``--dist``: tests of one file stay in one process for its fixtures, and the fast ones of the packages that
    import ray, for their one Ray. The slow ones start Rays of their own, two files at a time."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        fast = "not slow" in self.config.option.markexpr
        return "ray" if fast and file.startswith(RAY) else file

    def _assign_work_unit(self, node: Any) -> None:
        """Begin with what takes longest: at the end it would leave the other process without work."""
        for file in reversed(LONG):
            if file in self.workqueue:
                self.workqueue.move_to_end(file, last=False)
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Together:
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where torch finds none."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU, and torch finds none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random Llama of four narrow blocks with SmolLM2's tokenizer."""
    from raycloud.models.loading import load_tokenizer, resolve

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(resolve("builtin:smollm2-135m-instruct")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray session of all fast tests, with resources for teachers and students."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        resources={"cloud": 4, "edge": 8},
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=512 * 1024**2,
    )
    yield
    ray.shutdown()
