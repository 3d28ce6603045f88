"""Distillation job on one Ray: resume, repetition and recovery from failures."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raycloud.cluster.rounds import RoundOutcome, StudentHandle
from raycloud.distill.learner import Heartbeat
from raycloud.errors import Interrupted, ResultError
from raycloud.jobs import distill as job
from raycloud.jobs.distill import run
from raycloud.rounds.versions import VersionStore
from tests.cluster.recipes import small
from tests.jobs.distill_run import events, logged, records, weights

pytestmark = pytest.mark.usefixtures("local_ray")


def test_a_finished_run_is_refused_and_resuming_it_changes_nothing(distilled: Path, tiny_llama: Path) -> None:
    before = (distilled / "summary.json").read_bytes()
    with pytest.raises(ResultError, match="--resume"):
        run(small(tiny_llama, distilled))
    assert run(small(tiny_llama, distilled), "resume")["rounds"] == 3
    assert (distilled / "summary.json").read_bytes() == before


def interrupting(
    monkeypatch: pytest.MonkeyPatch,
    when: Callable[[dict[str, StudentHandle], dict[str, Heartbeat]], None],
    *,
    anytime: bool = False,
) -> None:
    """Call ``when`` once in round 1 (the second): when "store" has trained some of its steps, or at any time."""
    original, called = job.run_round, list[bool]()

    def disturbed(
        number: int,
        index: int,
        members: Sequence[StudentHandle],
        weights: Any,
        recipe: Any,
        on_progress: Any,
        *gates: Any,
    ) -> RoundOutcome:
        def watching(heartbeats: dict[str, Heartbeat]) -> None:
            on_progress(heartbeats)
            if index == 1 and not called and (anytime or "store" in heartbeats):
                called.append(True)
                when({member.name: member for member in members}, heartbeats)

        return original(number, index, members, weights, recipe, watching, *gates)

    monkeypatch.setattr(job, "run_round", disturbed)


@pytest.mark.waits
def test_a_killed_student_is_left_out_and_takes_part_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(_: dict[str, StudentHandle], heartbeats: dict[str, Heartbeat]) -> None:
        os.kill(heartbeats["store"].pid, signal.SIGKILL)

    interrupting(monkeypatch, kill)
    # Rounds long enough to be killed in the middle of.
    recipe = small(tiny_llama, tmp_path / "run", rounds={"count": 3, "steps": 30, "deadline_s": 280, "rejoin_s": 280})
    summary = run(recipe)
    assert summary["rounds"] == 3
    took_part = [sorted(record["students"]) for record in records(tmp_path / "run", "round")]
    assert took_part == [["newsroom", "store"], ["newsroom"], ["newsroom", "store"]]
    missed = [(record["round"], record["student"], record["why"]) for record in records(tmp_path / "run", "missed")]
    assert missed == [(1, "store", "died")]


@pytest.mark.waits
@pytest.mark.slow
def test_a_late_student_is_left_out_stops_and_takes_part_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def suspend(_: dict[str, StudentHandle], heartbeats: dict[str, Heartbeat]) -> None:
        pid = heartbeats["store"].pid
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(64.0, os.kill, (pid, signal.SIGCONT)).start()

    interrupting(monkeypatch, suspend)
    recipe = small(tiny_llama, tmp_path / "run", rounds={"count": 3, "steps": 40, "deadline_s": 60})
    assert run(recipe)["rounds"] == 3
    missed = [(record["round"], record["student"], record["why"]) for record in records(tmp_path / "run", "missed")]
    assert (1, "store", "late") in missed
    assert sorted(records(tmp_path / "run", "round")[2]["students"]) == ["newsroom", "store"]


@pytest.mark.parametrize("damaged", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_weights(
    damaged: bool, distilled: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the second round; the actors of the interrupted run are gone when it goes on.

    Where the newest checkpoint is damaged, it goes on from the one before.
    """

    def stop(members: dict[str, StudentHandle], _: dict[str, Heartbeat]) -> None:
        for member in members.values():
            ray.kill(member.actor)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        interrupting(patched, stop, anytime=True)
        with pytest.raises(Interrupted, match="continue with --resume"):
            run(small(tiny_llama, tmp_path / "run"))
    assert (tmp_path / "run" / "state" / "round-0001").is_dir()
    if damaged:
        [path] = (tmp_path / "run" / "state" / "round-0001").glob("*/weights.safetensors")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1  # within a tensor: the library reads it as it is
        path.write_bytes(content)
    assert run(small(tiny_llama, tmp_path / "run"), "resume")["rounds"] == 3
    assert [record["round"] for record in records(tmp_path / "run", "round")] == [0, 1, 2]
    shown = events(tmp_path / "run")
    assert shown["store"]["loss"] == logged(tmp_path / "run", "store", "loss")  # no step twice
    assert [at for at, _ in shown["round"]["loss"]] == [0, 1, 2]
    for name, tensor in weights(distilled).items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name])
    told = {path: VersionStore(path / "versions").records() for path in (distilled, tmp_path / "run")}
    mine, theirs = ([one.model_dump(exclude={"time"}) for one in records] for records in told.values())
    assert mine == theirs and mine[0]["note"] == "start" and [one["round"] for one in mine] == [None, 1, 2, 3]


def test_a_run_stopped_in_its_last_evaluation_trains_no_round_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(tiny_llama, tmp_path / "run", rounds={"count": 1, "steps": 2})

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job._DistillRun, "_scores", stop)
        with pytest.raises(Interrupted, match="continue with --resume"):
            run(recipe)
    trained = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(job, "run_round", stop)
    summary = run(recipe, "resume")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == trained
    for scores in summary["groups"].values():
        assert set(scores["single_ppl"]) == {"store", "newsroom"}
        assert scores["student_ppl_after"] not in scores["single_ppl"].values()


@pytest.mark.slow
def test_several_replicas_answer_and_a_killed_one_comes_back(
    distilled: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are bit for bit those of the run that nothing disturbed."""
    killed: list[Any] = []
    original = job._DistillRun._start_students

    def start(self: Any, checkpoint: Any) -> list[StudentHandle]:
        killed.append(self.replicas[1])
        ray.kill(self.replicas[1], no_restart=False)
        return original(self, checkpoint)

    monkeypatch.setattr(job._DistillRun, "_start_students", start)
    recipe = small(tiny_llama, tmp_path / "run", teacher={"replicas": 2})
    assert run(recipe)["rounds"] == 3
    assert killed
    for name, tensor in weights(distilled).items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name])
