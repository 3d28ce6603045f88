"""Activation cache: both ends store the same states of each text, and small changes arrive almost exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from raycloud.split.finetune.activation_cache import _TENSOR_BYTES, ActivationCache
from raycloud.split.finetune.wire_dtype import WireDType
from raycloud.split.finetune.wire_format import WireFormat, WireFormats

WIDTH, COUNTS, PLACES = 16, [3, 5], [7, 2]


def wire_formats(form: WireDType, changes: bool = True) -> WireFormats:
    return WireFormats(WireFormat(form, WIDTH, 2, changes), WireFormat("float32", WIDTH))


def visit(ends: tuple[ActivationCache, ActivationCache], numbers: Tensor) -> Tensor:
    """Return the states that arrive."""
    sender, receiver = ends
    places = receiver.read_visits(sender.announce_visits(PLACES))
    assert places == PLACES
    return receiver.unpack("first", sender.pack("first", numbers, PLACES, COUNTS), places, COUNTS)


def assert_alike(one: ActivationCache, other: ActivationCache) -> None:
    ours, theirs = one.state(), other.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("form", ["float16", "int8", "int4"])
def test_what_changes_little_arrives_nearly_as_it_was(form: WireDType) -> None:
    chance = torch.Generator().manual_seed(0)
    ends = ActivationCache(wire_formats(form)), ActivationCache(wire_formats(form))
    numbers = torch.randn(sum(COUNTS), WIDTH, generator=chance)
    errors = []
    for _ in range(4):
        arrived = visit(ends, numbers)
        assert_alike(*ends)
        errors.append(float((arrived - numbers).norm()))
        numbers = numbers + 0.02 * torch.randn(numbers.shape, generator=chance)
    assert ends[0].nbytes == ends[1].nbytes == numbers.nbytes + len(COUNTS) * _TENSOR_BYTES
    plain = WireFormat(form, WIDTH, 2)
    wholly = plain.unpack(plain.pack(numbers), len(numbers))
    assert errors[0] > 5 * errors[1] > 0
    assert float((wholly - numbers).norm()) > 5 * max(errors[1:])


def test_where_no_changes_cross_nothing_is_remembered() -> None:
    ends = ActivationCache(wire_formats("int8", changes=False)), ActivationCache(wire_formats("int8", changes=False))
    assert not ends[0].kept
    assert ends[0].state() == {}


def test_what_is_remembered_is_kept_as_tensors() -> None:
    numbers = torch.randn(sum(COUNTS), WIDTH, generator=torch.Generator().manual_seed(1))
    ends = ActivationCache(wire_formats("int4")), ActivationCache(wire_formats("int4"))
    visit(ends, numbers)
    again = ActivationCache(wire_formats("int4")), ActivationCache(wire_formats("int4"))
    for memory, kept in zip(again, ends, strict=True):
        memory.load(kept.state())
        assert memory.nbytes == numbers.nbytes + len(COUNTS) * _TENSOR_BYTES
    assert torch.equal(visit(again, numbers), visit(ends, numbers))
    again[0].load({})
    assert again[0].nbytes == 0


def test_ends_that_remember_different_things_find_out() -> None:
    numbers = torch.ones(sum(COUNTS), WIDTH)
    ends = ActivationCache(wire_formats("int8")), ActivationCache(wire_formats("int8"))
    visit(ends, numbers)
    with pytest.raises(ValueError, match="text 7: one side counts 0 visits, the other 1"):
        ends[1].read_visits(ActivationCache(wire_formats("int8")).announce_visits(PLACES))
    with pytest.raises(ValueError, match="text 7 has 5 tokens, it had 3"):
        ends[0].pack("first", numbers, PLACES, COUNTS[::-1])
