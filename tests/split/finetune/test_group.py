"""Rounds of a group: which edges a round waits for, and what happens to their contributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.rounds.machine import RoundMachine
from raycloud.rounds.recipe import AggregatorName
from raycloud.split.finetune.group import Group, GroupRoundOutcome

DEADLINE = 10.0


def group(*names: str, ended: int = 0, aggregation: AggregatorName = "mean") -> Group:
    made = Group(names, DEADLINE, RoundMachine({}, ended), aggregation=aggregation)
    for name in names:
        made.register(name, name.encode())
    return made


def contribute(edges: Group, name: str, value: float, samples: int = 1, *, now: float, **edge: Tensor) -> None:
    edges.add_contribution(name, {"middle.weight": torch.full((2,), value)}, edge, samples, now)


def test_a_round_ends_with_the_last_work_and_the_next_one_begins() -> None:
    edges = group("a", "b")
    contribute(edges, "b", 3.0, 3, now=0.0)
    assert edges.close_if_due(DEADLINE - 1) is None
    contribute(edges, "a", 1.0, 1, now=DEADLINE - 1)
    assert edges.close_if_due(DEADLINE - 1) == GroupRoundOutcome(1, ("a", "b"), {}, samples=4)
    assert edges.cloud["middle.weight"].tolist() == [2.5, 2.5]
    assert edges.ended == 1 and not edges.has_contributed("a")
    assert edges.close_if_due(1e9) is None  # nobody has brought anything


def test_the_beginning_is_the_first_ones_by_name_whoever_came_first() -> None:
    edges = group("a", "b", ended=-1)
    contribute(edges, "b", 3.0, now=0.0)
    contribute(edges, "a", 1.0, now=1.0)
    assert edges.close_if_due(1.0) == GroupRoundOutcome(0, ("a", "b"), {}, samples=2)
    assert edges.cloud["middle.weight"].tolist() == [1.0, 1.0]


def test_work_that_was_brought_stays_though_it_is_brought_again() -> None:
    edges = group("a", "b")
    contribute(edges, "a", 1.0, now=0.0)
    contribute(edges, "a", 9.0, now=8.0)
    assert edges.close_if_due(DEADLINE) == GroupRoundOutcome(1, ("a",), {"b": "late"}, samples=1)
    assert edges.cloud["middle.weight"].tolist() == [1.0, 1.0]


def test_who_left_is_not_waited_for_until_it_is_back() -> None:
    edges = group("a", "b")
    contribute(edges, "a", 1.0, now=0.0)
    edges.unregister("b", b"an older session")
    assert edges.close_if_due(0.0) is None
    edges.unregister("b", b"b")
    assert edges.close_if_due(0.0) == GroupRoundOutcome(1, ("a",), {"b": "absent"}, samples=1)
    contribute(edges, "a", 1.0, now=1.0)
    edges.register("b", b"b again")
    assert edges.is_current_session("b", b"b again") and not edges.is_current_session("b", b"b")
    assert edges.close_if_due(1.0) is None


def test_who_never_comes_is_waited_for_once() -> None:
    edges = Group(("a", "b"), DEADLINE, RoundMachine({}, 0))
    edges.register("a", b"a")
    contribute(edges, "a", 1.0, now=5.0)
    assert edges.close_if_due(5.0 + DEADLINE - 0.1) is None
    assert edges.close_if_due(5.0 + DEADLINE) == GroupRoundOutcome(1, ("a",), {"b": "absent"}, samples=1)
    contribute(edges, "a", 2.0, now=20.0)
    assert edges.close_if_due(20.0) == GroupRoundOutcome(2, ("a",), {"b": "absent"}, samples=1)


def test_weights_that_only_the_beginning_brings_stay() -> None:
    edges = group("a", ended=-1)
    edges.add_contribution("a", {}, {"encoder.weight": torch.ones(2)}, 1, now=0.0)
    edges.close_if_due(0.0)
    edges.add_contribution("a", {}, {"head.weight": torch.zeros(2)}, 1, now=0.0)
    edges.close_if_due(0.0)
    assert edges.edge.keys() == {"encoder.weight", "head.weight"}


def test_a_refused_contribution_ends_no_round() -> None:
    edges = group("a", "b")
    with pytest.raises(ValueError, match="not all finite"):
        contribute(edges, "a", float("nan"), now=0.0)
    assert edges.close_if_due(DEADLINE) is None and edges.ended == 0
    contribute(edges, "a", 1.0, now=DEADLINE)
    contribute(edges, "b", 3.0, now=DEADLINE)
    assert edges.close_if_due(DEADLINE) == GroupRoundOutcome(1, ("a", "b"), {}, samples=2)


def test_a_group_may_take_the_median() -> None:
    edges = group("a", "b", "c", aggregation="median")
    for name, value in (("a", 1.0), ("b", 100.0), ("c", 2.0)):
        contribute(edges, name, value, 1, now=0.0)
    edges.close_if_due(0.0)
    assert edges.cloud["middle.weight"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ({"head": torch.ones(3)}, "1 tensors are not those of the other edges, the first is 'edge/head'"),
        ({"head": torch.ones(2).half()}, "the first is 'edge/head'"),
        ({"heads": torch.ones(2)}, "2 tensors"),
        ({"head": torch.tensor([1.0, float("nan")])}, "not all finite"),
    ],
)
def test_work_of_another_kind_is_refused(edge: dict[str, Tensor], message: str) -> None:
    edges = group("a", "b")
    contribute(edges, "a", 1.0, head=torch.ones(2), now=0.0)
    with pytest.raises(ValueError, match=message):
        contribute(edges, "b", 1.0, **edge, now=0.0)
