"""Contributions to a round, with a fake Ray that answers at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from raycloud.cluster import rounds as ray_rounds
from raycloud.cluster.rounds import MissedStudent, StudentHandle, run_round
from raycloud.distill.learner import NOT_FINITE, StudentUpdate
from raycloud.distill.recipe import DistillRoundsRecipe
from raycloud.errors import TrainingError
from raycloud.link.meter import Meter
from raycloud.rounds.machine import RoundMachine


class Ray:
    """Fake ``ray``: a call is its own result, and an error as result is raised."""

    put = staticmethod(lambda value: value)

    @staticmethod
    def wait(refs: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        return refs[:1], refs[1:]

    @staticmethod
    def get(ref: Any, **options: Any) -> Any:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value


class Ref:
    def __init__(self, value: Any) -> None:
        self.value = value


class Call:
    def __init__(self, value: Any) -> None:
        self.value = value

    def remote(self, *arguments: Any) -> Ref:
        return Ref(self.value)


class Actor:
    """Fake student that answers with given weights, or fails."""

    def __init__(self, name: str, outcome: Any) -> None:
        if isinstance(outcome, dict):
            outcome = StudentUpdate(name, 0, outcome, 10, [], 1.0, Meter(), None)  # type: ignore[arg-type]
        self.prepare, self.train, self.advance, self.heartbeat = Call(5), Call(outcome), Call(None), Call(None)


def weights(value: float) -> dict[str, Tensor]:
    return {"a": torch.tensor([1.0, value]), "b": torch.ones(2, 2)}


def failed(error: Exception) -> RayTaskError:
    return RayTaskError("train", f"Traceback\n{type(error).__name__}: {error}", error)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_rounds, "ray", Ray)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_and_the_others_averaged(value: float) -> None:
    """Regression: one of these made the averaged weights NaN."""
    outcomes = {"good": weights(1.0), "wild": weights(value), "fine": weights(3.0)}
    members = [StudentHandle(name, "all", Actor(name, outcome)) for name, outcome in outcomes.items()]
    rounds = {"all": RoundMachine(weights(0.0))}
    done = run_round(1, 0, members, rounds, DistillRoundsRecipe(), lambda heartbeats: None)
    assert [answer.name for answer in done.answers] == ["fine", "good"]
    assert rounds["all"].weights["a"].tolist() == [1.0, 2.0]
    assert done.missed == [MissedStudent("wild", "diverged", NOT_FINITE)]
    assert [member.ready for member in members] == [True, False, True]


def test_a_student_that_says_so_itself_is_left_out_alike() -> None:
    gone = failed(TrainingError(NOT_FINITE))
    members = [
        StudentHandle("wild", "all", Actor("wild", gone)),
        StudentHandle("good", "all", Actor("good", weights(1.0))),
    ]
    rounds = {"all": RoundMachine(weights(0.0))}
    done = run_round(1, 0, members, rounds, DistillRoundsRecipe(), lambda heartbeats: None)
    assert [(one.name, one.why) for one in done.missed] == [("wild", "diverged")]
    assert NOT_FINITE in done.missed[0].detail and rounds["all"].weights["a"].tolist() == [1.0, 1.0]


def test_a_round_of_nothing_finite_keeps_the_weights() -> None:
    members = [StudentHandle("wild", "all", Actor("wild", weights(math.nan)))]
    rounds = {"all": RoundMachine(weights(0.0))}
    done = run_round(1, 0, members, rounds, DistillRoundsRecipe(), lambda heartbeats: None)
    assert (rounds["all"].version, done.answers, len(done.missed)) == (-1, [], 1)
    assert rounds["all"].weights["a"].tolist() == [1.0, 0.0]


def test_an_update_with_other_tensors_is_left_out() -> None:
    outcomes = {"good": weights(1.0), "odd": {"a": torch.ones(2)}}
    members = [StudentHandle(name, "all", Actor(name, outcome)) for name, outcome in outcomes.items()]
    rounds = {"all": RoundMachine(weights(0.0))}
    done = run_round(1, 0, members, rounds, DistillRoundsRecipe(), lambda heartbeats: None)
    detail = "1 tensors are not those of the other edges, the first is 'b'"
    assert done.missed == [MissedStudent("odd", "failed", detail)]
    assert rounds["all"].weights["a"].tolist() == [1.0, 1.0]


def test_each_cohort_has_its_own_round_and_a_recipe_chooses_the_aggregation() -> None:
    values = {"a": 1.0, "b": 2.0, "c": 9.0, "d": math.nan}
    members = [
        StudentHandle(name, "wild" if name == "d" else "calm", Actor(name, weights(value)))
        for name, value in values.items()
    ]
    rounds = {cohort: RoundMachine(weights(0.0)) for cohort in ("calm", "wild")}
    recipe = DistillRoundsRecipe(aggregation="median")
    run_round(1, 0, members, rounds, recipe, lambda heartbeats: None)
    assert rounds["calm"].weights["a"].tolist() == [1.0, 2.0]
    assert [machine.version for machine in rounds.values()] == [0, -1]
    recipe = DistillRoundsRecipe()
    run_round(2, 1, members[:3], {"calm": rounds["calm"]}, recipe, lambda heartbeats: None)
    assert rounds["calm"].weights["a"].tolist() == [1.0, 4.0]


def test_fewer_updates_than_the_quorum_are_discarded_and_the_weights_stay() -> None:
    outcomes = {"good": weights(1.0), "wild": weights(math.nan), "fine": weights(3.0)}
    members = [StudentHandle(name, "all", Actor(name, outcome)) for name, outcome in outcomes.items()]
    rounds = {"all": RoundMachine(weights(0.0))}
    done = run_round(1, 0, members, rounds, DistillRoundsRecipe(quorum=3), lambda heartbeats: None)
    assert done.answers == [] and rounds["all"].weights["a"].tolist() == [1.0, 0.0]
    discarded = [(one.name, one.why) for one in done.missed if one.why == "no_quorum"]
    assert discarded == [("fine", "no_quorum"), ("good", "no_quorum")]
    done = run_round(2, 0, [members[0], members[2]], rounds, DistillRoundsRecipe(quorum=2), lambda heartbeats: None)
    assert len(done.answers) == 2 and rounds["all"].weights["a"].tolist() == [1.0, 2.0]


def test_a_gate_keeps_the_former_weights_of_its_cohort_alone() -> None:
    values = {"a": 5.0, "b": 5.0}
    members = [StudentHandle(name, name, Actor(name, weights(value))) for name, value in values.items()]
    rounds = {cohort: RoundMachine(weights(0.0)) for cohort in values}
    gates = {"a": lambda held: -float(held["a"][1])}
    done = run_round(1, 0, members, rounds, DistillRoundsRecipe(), lambda heartbeats: None, gates)
    assert done.gate_refused == ["a"] and len(done.answers) == 2
    assert rounds["a"].weights["a"].tolist() == [1.0, 0.0] and rounds["b"].weights["a"].tolist() == [1.0, 5.0]
