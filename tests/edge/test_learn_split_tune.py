"""A device in a split fine-tuning: weights as of an edge in one process, and consent before any download."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raycloud.edge.learn import learn
from raycloud.edge.learn_session import LearnOptions
from raycloud.edge.learn_terms import Allowance, JobDemands, split_tune_demands
from raycloud.errors import LinkSetupError, RecipeError
from raycloud.link.channel import Channel, Connection, Loopback
from raycloud.models.loading import load_config
from raycloud.rounds.service import RoundClient, RoundLimits, RoundServer
from raycloud.split.finetune.assembly import plan_of
from raycloud.split.finetune.device_member import device_members
from raycloud.split.finetune.group_member import MemberRun
from raycloud.split.finetune.phase_report import PHASES, PhaseReport
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.server import TuneServer
from raycloud.split.parts import load_cloud
from raycloud.split.plan import PlanSet
from tests.cluster.recipes import split_edges

WAIT_S = 200
DATA = "builtin:instruct"


class Killed(BaseException):
    """End of a process, as far as the code notices it."""


class Job:
    """Cloud of a job whose only edge is a device: the cloud's blocks, and the service of rounds."""

    def __init__(self, recipe: SplitTuneRecipe, folder: Path) -> None:
        self.recipe = recipe
        plans = PlanSet.of(plan_of(recipe, load_config(str(recipe.model))))
        part = load_cloud(recipe.model, plans, device="cpu", dtype="float32", training=True)
        # Sums in more than one thread may round otherwise than in one, as the device computes.
        self.tuning = TuneServer(part, folder, threads=1)
        self.rounds = RoundServer(device_members(recipe, "run1"), RoundLimits(poll_s=0.2, handshake_s=60, send_s=60))
        self.services = {"rounds": self.rounds, "split-tune": self.tuning}
        self.loopbacks = {name: Loopback(self._served(name)) for name in self.services}
        self.opened: list[str] = []
        self.channels: list[Channel] = []
        self.reports: dict[str, PhaseReport] = {}

    def _served(self, name: str) -> Any:
        async def serve(connection: Connection) -> None:
            await self.services[name].serve(connection, "a token")

        return serve

    def connect(self, service: str, session: str) -> Channel:
        self.opened.append(service)
        # A killed device closes nothing: its channels are kept, as asyncio drops tasks that nobody refers to.
        self.channels.append(self.loopbacks[service].connect())
        return self.channels[-1]

    def do(self, call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self.loopbacks["rounds"].loop).result(WAIT_S)

    def run(self) -> None:
        """Have the device run all phases."""
        for attempt, what in enumerate(PHASES):
            self.do(self.rounds.prepare("shop"))
            self.reports[what] = self.do(self.rounds.train("shop", attempt + 1, PHASES.index(what), {})).report
        self.do(self.rounds.finish({"shop": {}}, WAIT_S))

    def close(self) -> None:
        for loopback in self.loopbacks.values():
            loopback.close()
        self.tuning.close()


@pytest.fixture
def job(tiny_llama: Path, tmp_path: Path) -> Iterator[Job]:
    edges = [{"name": "shop", "device": True}]
    made = Job(split_edges(tiny_llama, tmp_path / "run", edges=edges), tmp_path / "cloud")
    yield made
    made.close()


def options(folder: Path, **changes: Any) -> LearnOptions:
    return LearnOptions(DATA, folder, **{"allowed": Allowance(send_hidden=True), "threads": 1, **changes})


def reference(job: Job, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metrics and weights of the same edge without the service of rounds, from the whole model."""
    data = job.recipe.data.model_copy(update={"source": DATA})
    recipe = job.recipe.model_copy(update={"data": data})

    def connect(session: str) -> Channel:
        return job.connect("split-tune", session)

    member = MemberRun(recipe, "shop", folder, connect, run="ref", group="ref")
    found = {"before": member.before(), "together": member.together(lambda record: None)}
    return found, load_file(folder / "together.safetensors")


def test_a_device_trains_to_the_same_weights_as_an_edge_with_the_whole_model(job: Job, tmp_path: Path) -> None:
    driver = threading.Thread(target=job.run, daemon=True)
    driver.start()
    lines: list[str] = []
    summary = learn("tune", job.connect, options(tmp_path / "device"), notify=lines.append)
    driver.join(WAIT_S)
    expected, weights = reference(job, tmp_path / "here")
    mine = load_file(summary["weights"])
    assert mine.keys() == weights.keys() and all(torch.equal(mine[name], weights[name]) for name in weights)
    assert {what: dict(job.reports[what].metrics) for what in expected} == expected
    assert summary["phases"].keys() == set(PHASES) and summary["counted"] == 4  # with round 0, the beginning
    steps = [record.step for record in job.reports["together"].records if record.kind == "step"]
    assert steps == list(range(6)) and job.reports["before"].facts["train_texts"] == 24
    assert "leaves this device: hidden states of your data and their gradients, to the cloud's blocks" in lines[1]
    assert "shop" not in str(summary["phases"])


def test_a_device_killed_in_a_phase_goes_on_to_the_same_weights(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = threading.Thread(target=job.run, daemon=True)
    driver.start()
    monkeypatch.setattr(RoundClient, "close", lambda self: None)  # a killed process says no farewell
    left = [("alone", 2), ("together", 5)]

    def kill(what: str, done: int, total: int, note: str) -> None:
        if left and (what, done) == left[0]:
            left.pop(0)
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            learn("tune", job.connect, options(tmp_path / "device"), on_progress=kill)
    with monkeypatch.context() as patched:  # killed between training and the acceptance of its report
        patched.setattr(RoundClient, "push", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            learn("tune", job.connect, options(tmp_path / "device"))
    monkeypatch.undo()
    trained: list[str] = []
    summary = learn(
        "tune", job.connect, options(tmp_path / "device"), on_progress=lambda what, *_: trained.append(what)
    )
    driver.join(WAIT_S)
    assert not left and not trained
    _, weights = reference(job, tmp_path / "here")
    mine = load_file(summary["weights"])
    assert all(torch.equal(mine[name], weights[name]) for name in weights)
    steps = [record.step for record in job.reports["together"].records if record.kind == "step"]
    assert steps == list(range(6))


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (Allowance(), "hidden states of the data would leave this device; allow it by --send-hidden"),
        (Allowance(send_hidden=True, max_bytes=1000), r"a round takes up to [\d.]+ MB; --max-bytes allows 0\.0 MB"),
        (Allowance(send_hidden=True, max_memory=10**5), r"training takes about [\d.]+ MB; --max-memory allows 0\.1 MB"),
    ],
)
def test_what_is_not_allowed_is_refused_before_anything_is_downloaded(
    job: Job, tmp_path: Path, allowed: Allowance, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pull(*_: Any) -> Any:
        raise AssertionError("something was downloaded")

    monkeypatch.setattr(RoundServer, "_pull", pull)
    with pytest.raises(RecipeError, match=said):
        learn("tune", job.connect, options(tmp_path / "device", allowed=allowed))
    assert job.opened == ["rounds"]


def test_a_round_takes_no_more_bytes_than_was_said(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[JobDemands] = []

    def noted(*about: Any) -> JobDemands:
        said.append(split_tune_demands(*about))
        return said[-1]

    monkeypatch.setattr("raycloud.edge.learn_split_tune.split_tune_demands", noted)
    with pytest.raises(RecipeError, match="--max-bytes allows"):
        learn("tune", job.connect, options(tmp_path / "device", allowed=Allowance(send_hidden=True, max_bytes=1)))
    driver = threading.Thread(target=job.run, daemon=True)
    driver.start()
    enough = Allowance(send_hidden=True, max_bytes=said[0].round_bytes, max_memory=said[0].memory_bytes)
    summary = learn("tune", job.connect, options(tmp_path / "device", allowed=enough))
    driver.join(WAIT_S)
    assert 0 < max(one["sent"] for one in summary["rounds"]) < said[0].bytes_up


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"where": {"domain": ["news"]}}, "edges: the device 'shop' brings its data; allowed: no where"),
        ({}, "task.pooling=first, and the device 'shop' gets no pooler; allowed with devices: mean"),
    ],
)
def test_recipes_that_no_device_can_take_part_in(change: dict[str, Any], said: str, tiny_llama: Path) -> None:
    task = {"kind": "classification", "classes": ["a", "b"], "pooling": "mean" if change else "first"}
    with pytest.raises(RecipeError, match=said):
        split_edges(tiny_llama, Path("run"), edges=[{"name": "shop", "device": True, **change}], task=task)


def test_a_job_that_sends_files_of_other_names_is_refused(job: Job, tmp_path: Path) -> None:
    device = job.rounds._devices["shop"]
    device.member = replace(device.member, blobs={"model/../../x.json": b"{}"})
    with pytest.raises(LinkSetupError, match="the cloud names an odd file"):
        learn("tune", job.connect, options(tmp_path / "device"))
