"""Rounds: what is accepted, when a round closes, and what becomes of the weights, in any order of events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from raycloud.rounds.aggregators import coverage_mean, mean
from raycloud.rounds.contribution import Contribution, form_of
from raycloud.rounds.machine import ClosedRound, RoundMachine

DEADLINE_S = 10.0


def contribution(value: float, samples: int = 1, **others: Tensor) -> Contribution:
    return Contribution({"w": torch.tensor([float(value), -float(value)]), **others}, samples)


def machine(members: Iterable[str] = ("a", "b"), **options: Any) -> RoundMachine:
    made = RoundMachine({"w": torch.zeros(2)})
    made.open(0, members, **{"deadline": DEADLINE_S, **options})
    return made


def reason(made: RoundMachine, name: str, number: int, given: Contribution) -> str | None:
    refusal = made.accept(name, number, given)
    return None if refusal is None else refusal.reason


def restarted(made: RoundMachine) -> RoundMachine:
    """The machine of another process: its state went through a file."""
    tensors, about = made.state()
    saved = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return RoundMachine.from_state(load(saved), json.loads(json.dumps(about)))


def test_a_round_closes_with_the_last_contribution_and_the_next_one_can_be_opened() -> None:
    rounds = machine()
    assert rounds.accept("b", 0, contribution(4.0, 3)) is None
    assert rounds.close(0.0, mean) is None and rounds.contributed("b")
    assert rounds.accept("a", 0, contribution(0.0, 1)) is None
    assert rounds.close(0.0, mean) == ClosedRound(0, ("a", "b"), (), "new_version", samples=4)
    assert rounds.weights["w"].tolist() == [3.0, -3.0]
    assert (rounds.version, rounds.ended, rounds.number) == (0, 0, None)
    assert rounds.close(1e9, mean) is None
    rounds.open(1, ["a"], deadline=1.0)
    assert rounds.number == 1 and not rounds.contributed("a")


def test_the_deadline_closes_without_those_that_are_late() -> None:
    rounds = machine()
    rounds.accept("b", 0, contribution(1.0))
    assert rounds.close(DEADLINE_S - 0.1, mean) is None
    assert rounds.close(DEADLINE_S, mean) == ClosedRound(0, ("b",), ("a",), "new_version", samples=1)
    assert reason(rounds, "a", 0, contribution(9.0)) == "closed"
    assert rounds.weights["w"].tolist() == [1.0, -1.0]


def test_below_its_quorum_a_round_makes_no_version_and_can_be_opened_again() -> None:
    rounds = machine("abc", quorum=2)
    rounds.accept("b", 0, contribution(5.0))
    assert rounds.close(DEADLINE_S, mean) == ClosedRound(0, ("b",), ("a", "c"), "no_quorum", samples=1)
    assert (rounds.version, rounds.ended) == (-1, 0) and rounds.weights["w"].tolist() == [0.0, 0.0]
    rounds.open(0, "abc", deadline=30.0, quorum=2)
    for name in "cab":
        assert rounds.accept(name, 0, contribution(1.0)) is None
    assert rounds.close(20.0, mean) == ClosedRound(0, ("a", "b", "c"), (), "new_version", samples=3)


def test_nobody_waits_for_a_removed_member_until_it_is_readmitted() -> None:
    rounds = machine()
    rounds.remove("b")
    rounds.accept("a", 0, contribution(2.0))
    rounds.readmit("b")
    assert rounds.close(0.0, mean) is None
    rounds.remove("b")
    assert rounds.close(0.0, mean) == ClosedRound(0, ("a",), ("b",), "new_version", samples=1)


def test_the_contribution_of_a_member_that_died_afterwards_counts() -> None:
    rounds = machine()
    rounds.accept("b", 0, contribution(2.0))
    rounds.remove("b")
    rounds.remove("a")
    assert rounds.close(0.0, mean) == ClosedRound(0, ("b",), ("a",), "new_version", samples=1)


def test_a_round_of_dead_members_closes_without_a_version() -> None:
    rounds = machine("a")
    rounds.remove("a")
    assert rounds.close(0.0, mean) == ClosedRound(0, (), ("a",), "no_quorum", samples=0)


@pytest.mark.parametrize(
    ("name", "number", "given", "why", "detail"),
    [
        ("c", 0, contribution(1.0), "unknown_member", "'c' is no member; members: a, b"),
        ("a", 1, contribution(1.0), "wrong_round", "for round 1, round 0 is open"),
        ("a", -1, contribution(1.0), "closed", "round -1 is closed"),
        ("b", 0, contribution(1.0), "repeated", "'b' has contributed to round 0"),
        ("a", 0, contribution(1.0, 0), "no_samples", "0 samples; allowed: 1 or more"),
        ("a", 0, contribution(float("nan")), "not_finite", "not all finite"),
        ("a", 0, contribution(float("inf")), "not_finite", "not all finite"),
        ("a", 0, Contribution({}, 1), "different_tensors", "1 tensors are not those of the other edges, the first is"),
        ("a", 0, contribution(1.0, x=torch.ones(1)), "different_tensors", "the first is 'x'"),
        ("a", 0, Contribution({"w": torch.ones(3)}, 1), "different_tensors", "the first is 'w'"),
        ("a", 0, Contribution({"w": torch.ones(2).half()}, 1), "different_tensors", "the first is 'w'"),
        (
            "a",
            0,
            Contribution({"w": torch.ones(2)}, 1, {"w": {0: torch.tensor([0, 1])}}),
            "different_tensors",
            "the first is 'w'",
        ),
    ],
)
def test_refusals_name_their_reason_and_change_nothing(
    name: str, number: int, given: Contribution, why: str, detail: str
) -> None:
    rounds = machine()
    rounds.accept("b", 0, contribution(3.0))
    refusal = rounds.accept(name, number, given)
    assert refusal is not None and refusal.reason == why and detail in refusal.detail
    rounds.close(DEADLINE_S, mean)
    assert rounds.weights["w"].tolist() == [3.0, -3.0]


def test_the_form_of_a_round_may_be_given() -> None:
    rounds = machine(form=form_of({"w": torch.zeros(2), "v": torch.zeros(1)}))
    assert reason(rounds, "a", 0, contribution(1.0)) == "different_tensors"
    assert reason(rounds, "a", 0, contribution(1.0, v=torch.ones(1))) is None


@pytest.mark.parametrize(
    ("index", "part", "accepted"),
    [
        ({0: torch.tensor([2, 0])}, torch.ones(2, 2), True),
        ({0: torch.tensor([2, 0]), 1: torch.tensor([1])}, torch.ones(2, 1), True),
        ({0: torch.tensor([2, 0])}, torch.ones(3, 2), False),
        ({0: torch.tensor([2, 2])}, torch.ones(2, 2), False),
        ({0: torch.tensor([0, 3])}, torch.ones(2, 2), False),
        ({0: torch.tensor([-1, 0])}, torch.ones(2, 2), False),
        ({2: torch.tensor([0])}, torch.ones(3, 2), False),
        ({0: torch.tensor([0.0, 1.0])}, torch.ones(2, 2), False),
    ],
)
def test_partial_contributions_are_averaged_by_index(index: dict[int, Tensor], part: Tensor, accepted: bool) -> None:
    whole = {"block": torch.zeros(3, 2), "other": torch.full((1,), 7.0)}
    rounds = RoundMachine(whole)
    rounds.open(0, "ab", deadline=DEADLINE_S, form=form_of(whole), partial=True)
    assert reason(rounds, "a", 0, Contribution({"else": torch.ones(1)}, 1)) == "different_tensors"
    refusal = reason(rounds, "a", 0, Contribution({"block": part}, 1, {"block": index}))
    assert refusal == (None if accepted else "different_tensors")
    rounds = restarted(rounds)
    rounds.close(DEADLINE_S, partial(coverage_mean, former=rounds.weights))
    assert rounds.weights["block"].sum() == (part.numel() if accepted else 0)
    assert rounds.weights["other"].tolist() == [7.0]


@pytest.mark.parametrize(
    ("number", "members", "options", "message"),
    [
        (3, "ab", {}, "round 3 is not after version 3"),
        (4, "aa", {}, "quorum 1 of members a, a"),
        (4, "", {}, "quorum 1 of members"),
        (4, "ab", {"quorum": 3}, "quorum 3 of members a, b; allowed: 1 to all"),
        (4, "ab", {"partial": True}, "need the form"),
    ],
)
def test_rounds_that_cannot_be_opened(number: int, members: str, options: dict[str, Any], message: str) -> None:
    rounds = RoundMachine({}, 3)
    with pytest.raises(ValueError, match=message):
        rounds.open(number, members, deadline=1.0, **options)
    rounds.open(4, "ab", deadline=1.0)
    with pytest.raises(ValueError, match="round 4 is open"):
        rounds.open(5, "ab", deadline=1.0)


def test_a_gate_keeps_the_former_version_if_the_figure_falls() -> None:
    def figure(weights: Any) -> float:
        return float(weights["w"][0])

    rounds = RoundMachine({"w": torch.tensor([1.0, -1.0])})
    results = []
    for number, value in enumerate([2.0, 1.5, 2.0, float("nan"), 3.0]):
        rounds.open(number, "a", deadline=1.0)
        rounds.accept("a", number, contribution(0.0 if np.isnan(value) else value))
        rounds = restarted(rounds)
        closed = rounds.close(0.0, mean, (lambda weights: float("nan")) if np.isnan(value) else figure)
        assert closed is not None
        assert rounds.figure == float(rounds.weights["w"][0])
        results.append((closed.result == "new_version", rounds.version, float(rounds.weights["w"][0])))
    assert results == [(True, 0, 2.0), (False, 0, 2.0), (True, 2, 2.0), (False, 2, 2.0), (True, 4, 3.0)]


def test_tensors_that_only_an_earlier_round_had_stay() -> None:
    rounds = RoundMachine({})
    rounds.open(0, "a", deadline=1.0)
    rounds.accept("a", 0, Contribution({"encoder": torch.ones(2)}, 1))
    rounds.close(0.0, mean)
    rounds.open(1, "a", deadline=1.0)
    rounds.accept("a", 1, Contribution({"head": torch.zeros(2)}, 1))
    rounds.close(0.0, mean)
    assert rounds.weights.keys() == {"encoder", "head"}


def test_a_state_that_is_none_is_refused() -> None:
    with pytest.raises(KeyError):
        RoundMachine.from_state({}, {"version": 1})


# Histories: any order of contributions, deaths, returns, repeats, late arrivals, ticks and restarts.

NAMES = ("a", "b", "c", "d")


def events(members: tuple[str, ...]) -> st.SearchStrategy[Any]:
    def sends(names: Iterable[str], offsets: Iterable[int], kinds: Iterable[str]) -> st.SearchStrategy[Any]:
        said = (st.sampled_from(tuple(one)) for one in (names, offsets, kinds))
        return st.tuples(st.just("send"), *said, st.integers(-8, 8), st.integers(1, 50))

    return st.one_of(
        sends(members, [0], ["sound"]),
        sends(members, [0], ["sound"]),
        sends(members, [0], ["sound"]),
        sends((*members, "stranger"), [0, -1, 1], ["sound", "nan", "shape"]),
        st.tuples(st.sampled_from(("die", "return")), st.sampled_from(members)),
        st.tuples(st.just("wait"), st.sampled_from((4.0, 11.0))),
        st.tuples(st.just("restart")),
    )


@dataclass
class Model:
    """What the rounds must come to, without tensors or a state machine: arrivals in a plain dictionary."""

    members: tuple[str, ...]
    quorum: int
    number: int = 0
    version: int = -1
    weights: tuple[float, float] = (0.0, 0.0)
    dead: set[str] = field(default_factory=set)
    arrived: dict[str, tuple[float, int]] = field(default_factory=dict)

    def refusal(self, name: str, offset: int, kind: str) -> str | None:
        if offset:
            return "closed" if offset < 0 else "wrong_round"
        if name not in self.members:
            return "unknown_member"
        if name in self.arrived:
            return "repeated"
        return {"sound": None, "nan": "not_finite", "shape": "different_tensors"}[kind]

    def closes(self, now: float, deadline: float) -> bool:
        return now >= deadline or all(name in self.arrived or name in self.dead for name in self.members)

    def close(self) -> None:
        if len(self.arrived) >= self.quorum:
            values, samples = zip(*(self.arrived[name] for name in self.members if name in self.arrived), strict=True)
            value = float(np.average(values, weights=samples))
            self.weights, self.version = (value, -value), self.number
        self.number, self.arrived, self.dead = self.number + 1, {}, set()


@pytest.mark.parametrize("count", range(1, 5))
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_any_history_gives_the_weights_of_the_arrivals_accepted(count: int, data: st.DataObject) -> None:
    """2,000 histories in all."""
    model = Model(NAMES[:count], data.draw(st.sampled_from(sorted({1, (count + 1) // 2, count}))))
    history = data.draw(st.lists(events(model.members), min_size=10, max_size=40))
    rounds = RoundMachine({"w": torch.zeros(2)})
    form = form_of(rounds.weights)
    now, deadline, restarts = 0.0, DEADLINE_S, 0
    rounds.open(0, model.members, deadline=deadline, quorum=model.quorum, form=form)
    for what, *told in history:
        if what == "send":
            name, offset, kind, value, samples = told
            given = contribution(float("nan") if kind == "nan" else value, samples)
            if kind == "shape":
                given = Contribution({"w": torch.ones(3)}, samples)
            wanted = model.refusal(name, offset, kind)
            assert reason(rounds, name, model.number + offset, given) == wanted
            if wanted is None:
                model.arrived[name] = (value, samples)
        elif what == "die":
            rounds.remove(told[0])
            model.dead.add(told[0])
        elif what == "return":
            rounds.readmit(told[0])
            model.dead.discard(told[0])
        elif what == "wait":
            now += told[0]
        else:
            rounds, restarts = restarted(rounds), restarts + 1
        closed = rounds.close(now, mean)
        assert (closed is not None) == model.closes(now, deadline)
        if closed is not None:
            arrived = tuple(name for name in model.members if name in model.arrived)
            assert (closed.number, closed.members) == (model.number, arrived)
            assert set(closed.missed) == set(model.members) - set(arrived)
            model.close()
            assert (closed.result == "new_version") == (model.version == closed.number)
            deadline = now + DEADLINE_S
            rounds.open(model.number, model.members, deadline=deadline, quorum=model.quorum, form=form)
        assert (rounds.version, rounds.number) == (model.version, model.number)
        np.testing.assert_allclose(rounds.weights["w"], model.weights, rtol=1e-5, atol=1e-5)
    event(f"versions: {min(model.version, 3)}")
    event(f"restarts: {min(restarts, 3)}")
