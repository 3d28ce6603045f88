"""Domains are recognised by their signatures, and changes that point apart are told."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from raycloud.retrain.domains import DomainMemory, StoredDomain, agreement
from raycloud.retrain.drift import DomainSignature, TapStatistics, drift_distances
from raycloud.retrain.update import BlockUpdate


def taps(shift: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 16, generator=generator) + shift for _ in range(3)]


SOURCE = TapStatistics.of(taps(0.0, 0))


def signature(shift: float, seed: int) -> DomainSignature:
    found = taps(shift, seed)
    return DomainSignature(drift_distances(found, SOURCE), tuple(one.mean(0) for one in found[1:]))


def test_a_domain_that_comes_back_has_its_own_changes() -> None:
    memory = DomainMemory(SOURCE, radius=0.6)
    assert not memory.nearest(signature(1.0, 1), 3)
    memory.store(signature(1.0, 1), {"a": torch.ones(2)})
    memory.store(signature(-1.0, 2), {"a": -torch.ones(2)})
    first, *others = memory.nearest(signature(1.0, 3), 3)
    assert first.deltas["a"].tolist() == [1, 1] and len(others) <= 1
    assert len(memory.nearest(signature(1.0, 3), 1)) == 1
    assert not memory.nearest(signature(9.0, 4), 3)
    memory.store(signature(1.0, 5), {"a": 2 * torch.ones(2)})
    again, *_ = memory.nearest(signature(1.0, 6), 3)
    assert len(memory.domains) == 2 and again.deltas["a"].tolist() == [2, 2]


def test_a_domain_is_the_same_after_its_file() -> None:
    stored = StoredDomain(signature(1.0, 1), {"x.weight": torch.arange(4.0)})
    back = StoredDomain.from_tensors(load(save(stored.tensors())))
    assert torch.equal(back.signature.distances, stored.signature.distances)
    assert back.signature.means is not None and stored.signature.means is not None
    assert all(torch.equal(*pair) for pair in zip(back.signature.means, stored.signature.means, strict=True))
    assert torch.equal(back.deltas["x.weight"], stored.deltas["x.weight"])
    without = StoredDomain(DomainSignature(stored.signature.distances), {})
    assert StoredDomain.from_tensors(without.tensors()).signature.means is None


def update(delta: Tensor, rows: list[int] | None = None) -> BlockUpdate:
    index = {} if rows is None else {"block.w": {0: torch.tensor(rows)}}
    return BlockUpdate("model", 0, 1, {"block.w": delta, "other.w": torch.ones(2)}, index)


def test_agreement_is_the_cosine_over_common_entries() -> None:
    shapes = {"block.w": torch.Size([4, 2]), "other.w": torch.Size([2])}
    whole = torch.arange(8.0).view(4, 2)
    assert agreement(update(whole), update(whole), shapes, "block.") == pytest.approx(1)
    assert agreement(update(whole), update(-whole), shapes, "block.") == pytest.approx(-1)
    assert agreement(update(whole), update(whole), shapes, "absent.") is None
    # Rows 3 and 1 of the whole against rows 0 and 1 of a slice: only row 1 is common.
    left, right = (
        update(torch.tensor([[9.0, 9.0], [1.0, 0.0]]), [3, 1]),
        update(torch.tensor([[5.0, 5.0], [1.0, 1.0]]), [0, 1]),
    )
    assert agreement(left, right, shapes, "block.") == pytest.approx(0.5**0.5)
    assert agreement(right, left, shapes, "block.") == pytest.approx(0.5**0.5)
    assert agreement(left, update(torch.ones(1, 2), [2]), shapes, "block.") is None
    # The order of a slice's rows does not matter.
    shuffled = update(torch.stack([whole[3], whole[0], whole[2]]), [3, 0, 2])
    assert agreement(shuffled, update(whole), shapes, "block.") == pytest.approx(1)
