"""Updates: bytes and back, merged by index, and rounds of several edges."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from raycloud.errors import ModelError
from raycloud.retrain.update import BlockUpdate
from raycloud.rounds.aggregators import coverage_mean
from raycloud.rounds.contribution import form_of
from raycloud.rounds.machine import RoundMachine


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(6, 4, generator=generator) for name in ("a", "b")}


def update(rows: list[int] | None = None, samples: int = 10, seed: int = 1, name: str = "a") -> BlockUpdate:
    count = 6 if rows is None else len(rows)
    delta = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    index = {} if rows is None else {name: {0: torch.tensor(rows)}}
    return BlockUpdate("model", 3, samples, {name: delta}, index)


def merged(*updates: BlockUpdate) -> dict[str, Tensor]:
    weights = whole()
    machine = RoundMachine(weights, 3)
    names = [f"edge{number}" for number in range(len(updates))]
    machine.open(4, names, deadline=1.0, form=form_of(weights), partial=True)
    for name, one in zip(names, updates, strict=True):
        assert machine.accept(name, 4, one.contribution(weights)) is None
    closed = machine.close(2.0, lambda contributions: coverage_mean(contributions, weights))
    assert closed is not None and closed.result == "new_version"
    return machine.weights


def test_an_update_is_the_same_after_its_bytes() -> None:
    sent = update([1, 3, 4])
    back = BlockUpdate.from_bytes(sent.to_bytes())
    assert (back.model, back.version, back.samples) == ("model", 3, 10)
    assert torch.equal(back.deltas["a"], sent.deltas["a"])
    assert torch.equal(back.index["a"][0], torch.tensor([1, 3, 4]))


def test_one_edge_is_a_direct_merge_and_everything_else_stays_bit_for_bit() -> None:
    sent, before = update([1, 4]), whole()
    after = merged(sent)
    assert torch.allclose(after["a"][[1, 4]], before["a"][[1, 4]] + sent.deltas["a"], atol=1e-6)
    assert torch.equal(after["a"][[0, 2, 3, 5]], before["a"][[0, 2, 3, 5]])
    assert torch.equal(after["b"], before["b"])


def test_the_order_of_edges_does_not_matter_and_equal_edges_are_one() -> None:
    some = [update([0, 1, 2], 10, 1), update([1, 2, 3], 30, 2), update(None, 20, 3)]
    one, other = merged(*some), merged(*some[::-1])
    assert torch.allclose(one["a"], other["a"], atol=1e-6)
    assert torch.allclose(merged(some[0], some[0], some[0])["a"], merged(some[0])["a"], atol=1e-6)
    before = whole()["a"]
    wanted = before[1] + (10 * some[0].deltas["a"][1] + 30 * some[1].deltas["a"][0] + 20 * some[2].deltas["a"][1]) / 60
    assert torch.allclose(one["a"][1], wanted, atol=1e-6)


def test_edges_with_other_entries_are_merged_one_after_another() -> None:
    left, right = update([0, 2], 10, 1), update([1, 5], 30, 2)
    both = merged(left, right)["a"]
    one, other = merged(left)["a"], merged(right)["a"]
    assert torch.equal(both[[0, 2]], one[[0, 2]]) and torch.equal(both[[1, 5]], other[[1, 5]])


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (update(name="c"), "the update has 'c', which the model has not"),
        (update([1, 9]), r"the index of 'a' in the update does not fit its shape \(6, 4\)"),
        (BlockUpdate("model", 3, 1, {"a": torch.zeros(5, 4)}), r"the change of 'a' is \(5, 4\); allowed: \(6, 4\)"),
        (BlockUpdate("model", 3, 1, {"a": torch.full((6, 4), torch.inf)}), "the update is not all finite"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(sent: BlockUpdate, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        sent.contribution(whole())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00" * 40,
        update().to_bytes()[:-3],
        save({"delta/a": torch.zeros(2)}),
        save({"delta/a": torch.zeros(2)}, {"update": json.dumps({"model": "m", "version": "x", "samples": 1})}),
        save({"elsewhere": torch.zeros(2)}, {"update": json.dumps({"model": "m", "version": 1, "samples": 1})}),
    ],
)
def test_bytes_that_are_no_update_are_refused_in_one_line(raw: bytes) -> None:
    with pytest.raises(ModelError, match=r"^\d+ bytes are no update of blocks: [^\n]*$"):
        BlockUpdate.from_bytes(raw)
