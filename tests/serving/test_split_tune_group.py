"""Edge devices that train in a group over real sockets to one replica's API, without a cluster."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from safetensors.torch import load_file

from raycloud.edge.endpoint import CloudEndpoint
from raycloud.errors import LinkError, RecipeError
from raycloud.jobs.registry import REPORTS
from raycloud.link.auth import Authenticator
from raycloud.link.channel import Channel
from raycloud.link.meter import Meter
from raycloud.report.render import render
from raycloud.results import read_records
from raycloud.serving.split_tune import build_api
from raycloud.split.finetune.device_run import run_member
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.server import TuneServer
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet, SplitPlan
from tests.split.finetune.test_run import recipe

TOKEN = "s3cret"
NAMES = ("product", "news")
EDGES = [{"name": name, "where": {"domain": [name]}} for name in NAMES]
ROUNDS = {"count": 2, "steps": 2, "deadline_s": 60}


@pytest.fixture(scope="module")
def cloud(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudEndpoint]:
    part = load_cloud(str(tiny_llama), PlanSet.of(SplitPlan(1, 3)), device="cpu", dtype="float32", training=True)
    host = TuneServer(part, tmp_path_factory.mktemp("checkpoints"), threads=1)
    server = uvicorn.Server(uvicorn.Config(build_api(host, Authenticator([TOKEN])), log_level="warning"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield CloudEndpoint(f"ws://127.0.0.1:{listening.getsockname()[1]}/v1/split-tune", TOKEN)
    server.should_exit = True
    thread.join(20)
    host.close()


def member(model: Path, output: Path, name: str, **changes: Any) -> SplitTuneRecipe:
    given: dict[str, Any] = {"edges": EDGES, "rounds": ROUNDS, "edge": name, "group": "shops", **changes}
    return recipe(model, output, **given)


def test_devices_train_the_cloud_part_together_though_sockets_are_cut(
    cloud: CloudEndpoint, tiny_llama: Path, tmp_path: Path
) -> None:
    """Each edge runs separately, with a recipe that names the group and the edge."""
    cuts: list[str] = []

    class Cut:
        """Channel whose socket is closed at the thirtieth message."""

        def __init__(self, inner: Channel) -> None:
            self._inner, self._sent = inner, 0

        def send(self, data: bytes) -> None:
            self._sent += 1
            if self._sent == 30:
                cuts.append("cut")
                self._inner.close()
            self._inner.send(data)

        def receive(self, timeout_s: float) -> bytes:
            return self._inner.receive(timeout_s)

        def close(self) -> None:
            self._inner.close()

    def device(name: str) -> dict[str, Any]:
        connect = partial(cloud.channel, Meter())
        return run_member(member(tiny_llama, tmp_path / name, name), lambda session: Cut(connect(session)))

    with ThreadPoolExecutor(2) as pool:
        summaries = dict(zip(NAMES, pool.map(device, NAMES), strict=True))
    assert len(cuts) >= 2
    learned = []
    for name, summary in summaries.items():
        edge = summary["edges"][name]
        assert edge["together"]["perplexity"] < edge["before"]["perplexity"]
        assert summary["rounds"] == [{"round": number, "members": list(NAMES), "missed": {}} for number in (1, 2)]
        page = tmp_path / name / "report.html"
        before = page.read_bytes()
        assert render(tmp_path / name, REPORTS) == page and page.read_bytes() == before
        learned.append(load_file(tmp_path / name / "edges" / name / "together.safetensors"))
    assert all(torch.equal(tensor, learned[1][key]) for key, tensor in learned[0].items())


@pytest.mark.waits
def test_a_device_that_comes_after_the_end_takes_what_the_others_made(
    cloud: CloudEndpoint, tiny_llama: Path, tmp_path: Path
) -> None:
    rounds = {**ROUNDS, "deadline_s": 0.5}
    early = member(tiny_llama, tmp_path / "early", "news", rounds=rounds, group="late")
    assert run_member(early, partial(cloud.channel, Meter()))["rounds"][-1]["missed"] == {"product": "absent"}
    late = member(tiny_llama, tmp_path / "late", "product", rounds=rounds, group="late")
    run_member(late, partial(cloud.channel, Meter()))
    steps = [one for one in read_records(tmp_path / "late" / "metrics.jsonl") if one["kind"] == "step"]
    assert steps == []
    ours = load_file(tmp_path / "late" / "edges" / "product" / "together.safetensors")
    theirs = load_file(tmp_path / "early" / "edges" / "news" / "together.safetensors")
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    other = member(tiny_llama, tmp_path / "other", "news", rounds={**rounds, "steps": 3}, group="late")
    with pytest.raises(LinkError, match="the group 'late' was begun with another total_steps, another steps"):
        run_member(other, partial(cloud.channel, Meter()))


def test_a_device_is_one_of_the_edges(cloud: CloudEndpoint, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"edge: null.*allowed: product, news"):
        run_member(recipe(tiny_llama, tmp_path / "x", edges=EDGES), partial(cloud.channel, Meter()))
    assert not (tmp_path / "x").exists()
