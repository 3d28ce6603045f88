"""Optimiser state of a student: from which state it continues after unfinished rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raycloud.distill.learner import StudentLearner
from raycloud.distill.objective import StudentOutput, weighted_sum
from raycloud.distill.objectives import CrossEntropy
from raycloud.distill.student import DistillMicroBatch
from raycloud.errors import TrainingError
from raycloud.link.meter import Meter
from raycloud.models.loading import load
from raycloud.models.weights import all_finite, weights_of
from raycloud.training.loop import Loss, Step, Trainer
from tests.cluster.recipes import small
from tests.distill.local_teacher import LocalTeacher

Make = Callable[[], StudentLearner]


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Factory of students; each call simulates a new process of the same student."""
    loaded = load(str(tiny_llama), device="cpu")
    weights = {name: tensor.clone() for name, tensor in weights_of(loaded.model).items()}
    monkeypatch.setattr(StudentLearner, "start", lambda self, n: self._resumed(n, weights, Meter()), raising=False)
    recipe = small(tiny_llama, tmp_path / "run", objective={"ce_weight": 1.0, "kd_weight": 0.0})

    def student() -> StudentLearner:
        folder = tmp_path / "students" / "store"
        return StudentLearner(recipe, recipe.edges[0], loaded.model.config, LocalTeacher(loaded), folder, threads=1)

    return student


def steps(student: StudentLearner, trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.step(student._micro_batches(trainer.step_index), partial(entropy, student))


def entropy(student: StudentLearner, micro_batch: DistillMicroBatch) -> Loss:
    return weighted_sum([(1.0, CrossEntropy())], StudentOutput.of(student._segment, micro_batch.batch))


def finish(student: StudentLearner, number: int, trainer: Trainer) -> dict[str, Tensor]:
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


def test_three_rounds_are_kept_since_only_the_driver_knows_which_one_counts(make: Make) -> None:
    student = make()
    for number in range(4):
        trainer = student.start(number)
        steps(student, trainer, 1)
        finish(student, number, trainer)
    assert sorted(student._saved()) == [1, 2, 3]


def test_a_damaged_state_is_left_out_for_the_one_before(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    student, states = make(), []
    for number in range(2):
        trainer = student.start(number)
        steps(student, trainer, 1)
        states.append(finish(student, number, trainer))
    path = student._file(1)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # within a tensor: the library reads it as it is
    path.write_bytes(content)
    found = make().start(2).state()
    assert all(torch.equal(found[name], one) for name, one in states[0].items() if one.dim())
    assert "optimiser state of round 2 left out" in caplog.text


def test_projectors_go_on_where_the_last_finished_round_left_them(tiny_llama: Path, tmp_path: Path) -> None:
    loaded = load(str(tiny_llama), device="cpu")
    weights = {name: tensor.clone() for name, tensor in weights_of(loaded.model).items()}
    recipe = small(tiny_llama, tmp_path / "run", objective={"kd": {"name": "dskd"}})

    def started(number: int) -> tuple[StudentLearner, Trainer]:
        folder = tmp_path / "students" / "store"
        student = StudentLearner(recipe, recipe.edges[0], loaded.model.config, LocalTeacher(loaded), folder, threads=1)
        return student, student._resumed(number, weights, Meter())

    def projectors(student: StudentLearner) -> dict[str, Tensor]:
        assert student._extras is not None
        return {name: tensor.clone() for name, tensor in student._extras.state_dict().items()}

    def moved(student: StudentLearner) -> None:
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


def test_a_round_that_diverged_is_not_kept(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: it entered the averaged weights and the moments of the student's next rounds."""
    student = make()
    student.start(0)  # type: ignore[attr-defined]
    weights = {name: tensor.clone() for name, tensor in weights_of(student._model).items()}
    sound = student.train(0, weights)
    assert sound is not None and all_finite(sound.weights)
    average = {name: tensor.clone() for name, tensor in sound.weights.items()}  # as it crosses between processes
    step = Trainer.step

    def diverge(self: Trainer, *arguments: object) -> Step:
        done = step(self, *arguments)  # type: ignore[arg-type]
        if self.step_index == 2 * student._recipe.rounds.steps:  # the last one of the round
            with torch.no_grad():
                student._model.get_output_embeddings().weight[0, 0] = math.nan
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", diverge)
        with pytest.raises(TrainingError, match="its weights are not all finite; a smaller"):
            student.train(1, average)
    assert student._saved() == [0]
    again = student.train(1, average)
    assert again is not None
    found = {name: tensor.clone() for name, tensor in again.weights.items()}
    fresh = make().train(1, average)
    assert fresh is not None
    for name, tensor in fresh.weights.items():
        assert torch.equal(found[name], tensor), name
