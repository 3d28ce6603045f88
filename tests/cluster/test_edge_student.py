"""A student's memory of its optimiser, without any Ray: what it goes on from after rounds it did not finish."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raycloud.cluster.cloud_teacher import TeacherFacts
from raycloud.cluster.edge_student import EdgeStudent
from raycloud.distill.objective import StudentOutput, weighted_sum
from raycloud.distill.objectives import CrossEntropy
from raycloud.distill.signals import frozen_head
from raycloud.distill.student import Lesson
from raycloud.link.meter import Meter
from raycloud.models.loading import load
from raycloud.models.segments import Segment
from raycloud.models.weights import weights_of
from raycloud.training.loop import Loss, Trainer
from tests.cluster.recipes import small

Make = Callable[[], EdgeStudent]


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A new process of the same student, as far as it can tell."""
    loaded = load(str(tiny_llama), device="cpu")
    weights = {name: tensor.clone() for name, tensor in weights_of(loaded.model).items()}
    monkeypatch.setattr(EdgeStudent, "_ask", lambda *_: TeacherFacts("t", loaded.tokenizer, 0))
    monkeypatch.setattr(EdgeStudent, "start", lambda self, n: self._resumed(n, weights, Meter()), raising=False)
    recipe = small(tiny_llama, tmp_path / "run", objective={"ce_weight": 1.0, "kd_weight": 0.0})

    def student() -> EdgeStudent:
        made = EdgeStudent(0, recipe, loaded.model.config, [], tmp_path / "students")
        made._load()
        return made

    return student


def steps(student: EdgeStudent, trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.step(student._lessons(trainer.step_index), partial(entropy, student))


def entropy(student: EdgeStudent, lesson: Lesson) -> Loss:
    return weighted_sum([(1.0, CrossEntropy())], StudentOutput.of(student._segment, lesson.batch))


def finish(student: EdgeStudent, number: int, trainer: Trainer) -> dict[str, Tensor]:
    student._save(number, trainer)
    student._through = number
    return {name: tensor.clone() for name, tensor in trainer.state().items()}


def same_moments(trainer: Trainer, state: dict[str, Tensor]) -> bool:
    now = trainer.state()
    return now.keys() == state.keys() and all(torch.equal(now[k], state[k]) for k in state if k != "step")


def test_a_finished_round_goes_on_in_memory_and_from_disk_alike(make: Make) -> None:
    student = make()
    trainer = student.start(0)
    steps(student, trainer, 3)
    state = finish(student, 0, trainer)
    assert same_moments(student.start(1), state)
    restarted = make()
    again = restarted.start(1)
    assert same_moments(again, state)
    assert again.step_index == 3


def test_an_unfinished_round_leaves_no_trace(make: Make) -> None:
    student = make()
    trainer = student.start(0)
    steps(student, trainer, 3)
    state = finish(student, 0, trainer)
    steps(student, student.start(1), 2)  # round 1 is broken off
    assert same_moments(student.start(2), state)
    assert same_moments(make().start(2), state)


def test_two_rounds_are_kept_since_only_the_driver_knows_which_one_counts(make: Make) -> None:
    student = make()
    for number in range(4):
        trainer = student.start(number)
        steps(student, trainer, 1)
        finish(student, number, trainer)
    assert sorted(student._saved()) == [2, 3]


def test_projectors_go_on_where_the_last_finished_round_left_them(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(str(tiny_llama), device="cpu")
    weights = {name: tensor.clone() for name, tensor in weights_of(loaded.model).items()}
    answers = {"prepare": TeacherFacts("t", loaded.tokenizer, 0), "head": frozen_head(Segment(loaded.model), "float32")}
    monkeypatch.setattr(EdgeStudent, "_ask", lambda self, method: answers[method])
    recipe = small(tiny_llama, tmp_path / "run", objective={"kd": {"name": "dskd"}})

    def started(number: int) -> tuple[EdgeStudent, Trainer]:
        student = EdgeStudent(0, recipe, loaded.model.config, [], tmp_path / "students")
        student._load()
        return student, student._resumed(number, weights, Meter())

    def projectors(student: EdgeStudent) -> dict[str, Tensor]:
        assert student._extras is not None
        return {name: tensor.clone() for name, tensor in student._extras.state_dict().items()}

    def moved(student: EdgeStudent) -> None:
        assert student._extras is not None
        with torch.no_grad():
            for parameter in student._extras.parameters():
                parameter += 1.0

    student, trainer = started(0)
    begun = projectors(student)
    assert trainer.optimizer.param_groups[-1]["peak_lr"] == recipe.objective.extras_lr
    moved(student)
    student._save(0, trainer)
    learnt = projectors(student)
    assert not torch.equal(learnt["t2s.weight"], begun["t2s.weight"])
    again, _ = started(1)
    assert all(torch.equal(value, learnt[name]) for name, value in projectors(again).items())
    moved(again)  # and its round is broken off
    again._resumed(2, weights, Meter())
    assert all(torch.equal(value, learnt[name]) for name, value in projectors(again).items())
    fresh, _ = started(0)
    assert all(torch.equal(value, begun[name]) for name, value in projectors(fresh).items())
