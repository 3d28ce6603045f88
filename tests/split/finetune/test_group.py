"""Who a round waits for, and what becomes of the work that is brought to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.split.finetune.group import Group, Outcome, Work, average

DEADLINE = 10.0


def group(*names: str, ended: int = 0) -> Group:
    made = Group(names, DEADLINE, ended=ended)
    for name in names:
        made.arrive(name, name.encode())
    return made


def work(value: float, samples: int = 1, **edge: Tensor) -> Work:
    return Work({"middle.weight": torch.full((2,), value)}, edge, samples)


def test_the_mean_is_by_samples_and_coordinates_stay_whole() -> None:
    apart = torch.tensor([3, 7])
    mean = average(
        [{"weight": torch.tensor([1.0, 2.0]), "apart": apart}, {"weight": torch.tensor([5.0, -2.0]), "apart": apart}],
        [30, 10],
    )
    assert mean["weight"].tolist() == [(30 * 1 + 10 * 5) / 40, (30 * 2 - 10 * 2) / 40]
    assert mean["apart"].tolist() == [3, 7] and mean["apart"].dtype == torch.long


def test_a_round_ends_with_the_last_work_and_the_next_one_begins() -> None:
    edges = group("a", "b")
    edges.bring("b", work(3.0, 3), now=0.0)
    assert edges.settle(DEADLINE - 1) is None
    edges.bring("a", work(1.0, 1), now=DEADLINE - 1)
    assert edges.settle(DEADLINE - 1) == Outcome(1, ("a", "b"), {})
    assert edges.cloud["middle.weight"].tolist() == [2.5, 2.5]
    assert edges.ended == 1 and not edges.brought("a")
    assert edges.settle(1e9) is None  # nobody has brought anything


def test_the_beginning_is_the_first_ones_by_name_whoever_came_first() -> None:
    edges = group("a", "b", ended=-1)
    edges.bring("b", work(3.0), now=0.0)
    edges.bring("a", work(1.0), now=1.0)
    assert edges.settle(1.0) == Outcome(0, ("a", "b"), {})
    assert edges.cloud["middle.weight"].tolist() == [1.0, 1.0]


def test_work_that_was_brought_stays_though_it_is_brought_again() -> None:
    edges = group("a", "b")
    edges.bring("a", work(1.0), now=0.0)
    edges.bring("a", work(9.0), now=8.0)
    assert edges.settle(DEADLINE) == Outcome(1, ("a",), {"b": "late"})
    assert edges.cloud["middle.weight"].tolist() == [1.0, 1.0]


def test_who_left_is_not_waited_for_until_it_is_back() -> None:
    edges = group("a", "b")
    edges.bring("a", work(1.0), now=0.0)
    edges.leave("b", b"an older session")
    assert edges.settle(0.0) is None
    edges.leave("b", b"b")
    assert edges.settle(0.0) == Outcome(1, ("a",), {"b": "absent"})
    edges.bring("a", work(1.0), now=1.0)
    edges.arrive("b", b"b again")
    assert edges.speaks("b", b"b again") and not edges.speaks("b", b"b")
    assert edges.settle(1.0) is None


def test_who_never_comes_is_waited_for_once() -> None:
    edges = Group(("a", "b"), DEADLINE, ended=0)
    edges.arrive("a", b"a")
    edges.bring("a", work(1.0), now=5.0)
    assert edges.settle(5.0 + DEADLINE - 0.1) is None
    assert edges.settle(5.0 + DEADLINE) == Outcome(1, ("a",), {"b": "absent"})
    edges.bring("a", work(2.0), now=20.0)
    assert edges.settle(20.0) == Outcome(2, ("a",), {"b": "absent"})


def test_weights_that_only_the_beginning_brings_stay() -> None:
    edges = group("a", ended=-1)
    edges.bring("a", Work({}, {"encoder.weight": torch.ones(2)}, 1), now=0.0)
    edges.settle(0.0)
    edges.bring("a", Work({}, {"head.weight": torch.zeros(2)}, 1), now=0.0)
    edges.settle(0.0)
    assert edges.edge.keys() == {"encoder.weight", "head.weight"}


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ({"head": torch.ones(3)}, "1 tensors are not those of the other edges, the first is 'head'"),
        ({"head": torch.ones(2).half()}, "the first is 'head'"),
        ({"heads": torch.ones(2)}, "2 tensors"),
        ({"head": torch.tensor([1.0, float("nan")])}, "not all finite"),
    ],
)
def test_work_of_another_kind_is_refused(edge: dict[str, Tensor], message: str) -> None:
    edges = group("a", "b")
    edges.bring("a", work(1.0, head=torch.ones(2)), now=0.0)
    with pytest.raises(ValueError, match=message):
        edges.bring("b", work(1.0, **edge), now=0.0)
