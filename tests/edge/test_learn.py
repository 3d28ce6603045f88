"""A device in a distillation: weights as of a student in one process, and consent before any download."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from raycloud.distill.device_member import device_member
from raycloud.distill.learner import StudentLearner
from raycloud.distill.recipe import DistillRecipe
from raycloud.distill.signals.file import tokenizer_fingerprint
from raycloud.distill.signals.remote import ModelTeacher, SignalServer
from raycloud.edge.learn import learn
from raycloud.edge.learn_session import LearnOptions
from raycloud.edge.learn_terms import Allowance, JobDemands, size_of
from raycloud.errors import LinkSetupError, RecipeError
from raycloud.link.channel import Channel, Connection, Loopback
from raycloud.models.loading import Pretrained, load
from raycloud.models.weights import Weights, nbytes, weights_of
from raycloud.rounds.service import DeviceGone, DeviceUpdate, RoundClient, RoundLimits, RoundServer
from raycloud.training.lora import add_adapters, trainable_weights
from tests.cluster.recipes import small
from tests.distill.local_teacher import LocalTeacher

WAIT_S = 200


class Killed(BaseException):
    """End of a process, as far as the code notices it."""


class Job:
    """Cloud of a job whose only edge is a device: a teacher, and the services of signals and rounds."""

    def __init__(self, loaded: Pretrained, recipe: DistillRecipe, start: Weights, frozen: Weights) -> None:
        self.recipe, self.start = recipe, dict(start)
        temperatures = recipe.temperatures
        self.teacher = LocalTeacher(loaded, "t@1", recipe.signal, temperatures, frozen)
        answering = ModelTeacher(loaded.model, "t@1", tokenizer_fingerprint(loaded.tokenizer))
        member = device_member(
            recipe, recipe.edges[0], loaded.model.config, nbytes(start), self.teacher, answering.head_shape, "run1"
        )
        self.rounds = RoundServer({"shop": member}, RoundLimits(poll_s=0.2, handshake_s=60, send_s=60))
        self.signals = SignalServer(answering)
        self.loopbacks = {name: Loopback(self._served(name)) for name in ("rounds", "signals")}
        self.opened: list[str] = []
        self.channels: list[Channel] = []

    def _served(self, name: str) -> Any:
        async def serve(connection: Connection) -> None:
            await getattr(self, name).serve(connection, "a token")

        return serve

    def connect(self, service: str, session: str) -> Channel:
        self.opened.append(service)
        # A killed device closes nothing: its channels are kept, as asyncio drops tasks that nobody refers to.
        self.channels.append(self.loopbacks[service].connect())
        return self.channels[-1]

    def do(self, call: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self.loopbacks["rounds"].loop).result(WAIT_S)

    def run(self, into: list[DeviceUpdate]) -> None:
        """Run all rounds; the only device's weights are the next version."""
        weights = self.start
        for number in range(self.recipe.rounds.count):
            self.do(self.rounds.prepare("shop"))
            update = self.do(self.rounds.train("shop", number + 1, number, weights))
            into.append(update)
            weights = update.weights
        self.do(self.rounds.finish({"shop": weights}, WAIT_S))

    def close(self) -> None:
        for loopback in self.loopbacks.values():
            loopback.close()


@pytest.fixture
def job(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Iterator[Job]:
    changes: dict[str, Any] = getattr(request, "param", {})
    loaded = load(str(tiny_llama), device="cpu")
    loaded.model.config.architectures = ["LlamaForCausalLM"]
    recipe = small(
        tiny_llama,
        tmp_path / "run",
        edges=[{"name": "shop", "device": True}],
        data={"limit": 40},
        rounds={"count": 2},
        **changes,
    )
    frozen: dict[str, Tensor] = {}
    start = {name: tensor.clone() for name, tensor in weights_of(loaded.model).items()}
    if recipe.student.lora is not None:
        frozen = start
        model = load(str(tiny_llama), device="cpu").model
        start = {k: v.clone() for k, v in trainable_weights(add_adapters(model, recipe.student.lora, 0)).items()}
    made = Job(loaded, recipe, start, frozen)
    yield made
    made.close()


def in_process(job: Job, folder: Path) -> dict[str, Tensor]:
    """Weights of the same student without a link."""
    edge = job.recipe.edges[0]
    config = job.teacher._model.config
    learner = StudentLearner(job.recipe, edge, config, job.teacher, folder, threads=1)
    weights = job.start
    for number in range(job.recipe.rounds.count):
        update = learner.train(number, weights)
        assert update is not None
        weights = {name: tensor.clone() for name, tensor in update.weights.items()}
    return weights


def options(folder: Path, **changes: Any) -> LearnOptions:
    return LearnOptions("builtin:reviews", folder, **{"allowed": Allowance(True), "threads": 1, **changes})


KINDS: list[dict[str, Any]] = [
    {},
    {"objective": {"kd": {"name": "dskd"}}},
    {"signal": {"kind": "topk", "k": 8}, "student": {"lora": {"r": 2}}},
    {"objective": {"ce_weight": 1.0, "kd_weight": 0.0}},
]


@pytest.mark.parametrize("job", KINDS, indirect=True, ids=["hidden", "projectors", "adapters", "no teacher"])
def test_a_device_trains_to_the_same_weights_as_a_student_in_process(job: Job, tmp_path: Path) -> None:
    updates: list[DeviceUpdate] = []
    driver = threading.Thread(target=job.run, args=(updates,), daemon=True)
    driver.start()
    summary = learn("distill", job.connect, options(tmp_path / "device"))
    driver.join(WAIT_S)
    expected = in_process(job, tmp_path / "here")
    assert updates[-1].weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(updates[-1].weights[name], tensor), name
    assert (summary["accepted"], summary["device"]) == (2, "shop")
    assert [one["accepted"] for one in summary["rounds"]] == [True, True]
    report = updates[-1].report
    assert len(report.steps) == 3 and sum(step.tokens for step in report.steps) == updates[-1].samples
    assert ("signals" in job.opened) == bool(job.recipe.objective.kd_weight)
    assert summary["student"] is not None
    AutoModelForCausalLM.from_pretrained(summary["student"])


def test_a_device_killed_in_mid_round_goes_on_to_the_same_weights(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[DeviceUpdate] = []
    driver = threading.Thread(target=job.run, args=(updates,), daemon=True)
    driver.start()
    monkeypatch.setattr(RoundClient, "close", lambda self: None)  # a killed process says no farewell
    left = [2, 3]  # steps until it is killed: in the first round, and between training and sending the second one

    def kill(what: str, done: int, total: int, note: str) -> None:
        if left and what.startswith(f"round {3 - len(left)}/") and done == left[0]:
            left.pop(0)
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            learn("distill", job.connect, options(tmp_path / "device"), on_progress=kill)
    monkeypatch.undo()
    summary = learn("distill", job.connect, options(tmp_path / "device"), on_progress=kill)
    driver.join(WAIT_S)
    assert summary["student"] is not None and not left
    expected = in_process(job, tmp_path / "here")
    assert all(torch.equal(updates[-1].weights[name], tensor) for name, tensor in expected.items())


def test_paths_of_the_cloud_are_not_looked_for_here(job: Job, tmp_path: Path) -> None:
    device = job.rounds._devices["shop"]
    recipe = json.loads(device.member.recipe)
    recipe["student"]["model"] = recipe["teacher"]["signals"] = recipe["data"]["validation"] = "/only/in/the/cloud"
    device.member = replace(device.member, recipe=json.dumps(recipe))
    updates: list[DeviceUpdate] = []
    driver = threading.Thread(target=job.run, args=(updates,), daemon=True)
    driver.start()
    assert learn("distill", job.connect, options(tmp_path / "device"))["accepted"] == 2
    driver.join(WAIT_S)


def test_what_was_trained_is_not_trained_again(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it sends its contribution, a device sends the same bytes."""
    updates: list[DeviceUpdate] = []
    driver = threading.Thread(target=job.run, args=(updates,), daemon=True)
    driver.start()
    with monkeypatch.context() as patched:
        patched.setattr(RoundClient, "push", lambda *_: (_ for _ in ()).throw(Killed))
        patched.setattr(RoundClient, "close", lambda self: None)
        with pytest.raises(Killed):
            learn("distill", job.connect, options(tmp_path / "device"))
    steps: list[tuple[str, int]] = []
    learn(
        "distill",
        job.connect,
        options(tmp_path / "device"),
        on_progress=lambda what, done, *_: steps.append((what, done)),
    )
    driver.join(WAIT_S)
    assert steps == [("round 2/2", 1), ("round 2/2", 2), ("round 2/2", 3)]
    assert len(updates) == 2


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (Allowance(), "token ids of the data would leave this device; allow it by --send-tokens"),
        (Allowance(True, max_bytes=1000), r"a round takes up to [\d.]+ MB; --max-bytes allows 0\.0 MB"),
        (Allowance(True, max_memory=10**6), r"training takes about [\d.]+ MB; --max-memory allows 1\.0 MB"),
    ],
)
def test_what_is_not_allowed_is_refused_before_anything_is_downloaded(
    job: Job, tmp_path: Path, allowed: Allowance, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pull(*_: Any) -> Any:
        raise AssertionError("something was downloaded")

    monkeypatch.setattr(RoundServer, "_pull", pull)
    lines: list[str] = []
    with pytest.raises(RecipeError, match=said):
        learn("distill", job.connect, options(tmp_path / "device", allowed=allowed), notify=lines.append)
    assert len(lines) == 4 and "token ids of your data, to the teacher, for hidden signals" in lines[1]
    assert job.opened == ["rounds"]


def test_a_round_that_takes_more_than_was_said_is_stopped(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JobDemands, "round_bytes", property(lambda self: 0))
    gone: list[str] = []

    def drive() -> None:
        try:
            job.run([])
        except DeviceGone as error:
            gone.append(str(error))

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    with pytest.raises(RecipeError, match=r"round \d of job 'distill' takes [\d.]+ MB; --max-bytes allows 0\.0 MB"):
        learn("distill", job.connect, options(tmp_path / "device", allowed=Allowance(True, max_bytes=2000)))
    driver.join(WAIT_S)
    assert len(gone) == 1


def test_only_a_device_of_the_job_takes_part(job: Job, tmp_path: Path) -> None:
    with pytest.raises(LinkSetupError, match="no device 'mill' takes part in this job; allowed: shop"):
        learn("distill", job.connect, options(tmp_path / "device", device="mill"))


def test_sizes() -> None:
    assert [size_of(one) for one in ("10", "1.5MB", "2 GiB", "3kb")] == [10, 1_500_000, 2**31, 3000]
    for wrong in ("", "MB", "-1", "3 XB", "1e9"):
        with pytest.raises(RecipeError, match="is no size"):
            size_of(wrong)
