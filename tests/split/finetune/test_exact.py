"""A model cut in three gets the weights of the stock model trained in one piece."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
import torch

from raycloud.link.meter import Meter
from raycloud.models.segments import Segment
from raycloud.split.finetune.bottleneck import Bottleneck, fit_low_rank
from raycloud.split.finetune.edge import UShapedEdge
from tests.split.finetune.wiring import (
    STEPS,
    WIDTH,
    Whole,
    batches,
    caught,
    distance,
    head_of,
    model_of,
    parts_of,
    sides,
    split,
    values,
)

FAMILIES = ["llama", "llama-tied", "qwen2", "gemma3", "gpt2", "opt", "bert"]
TOLERANCE = 1e-5
CUTS = [(0, 6), (1, 4), (5, 6)]
EVERY_CUT = list(itertools.combinations(range(7), 2))
_DRAWN = 2 * random.Random(0).sample(EVERY_CUT, len(EVERY_CUT))
SAMPLED = {family: _DRAWN[3 * place : 3 * place + 9] for place, family in enumerate(FAMILIES)}
"""Cuts of each family, drawn once and for all: nine of 21, each cut for three families."""


def full_rank(ahead: Segment) -> Bottleneck:
    """Make a bottleneck of full rank, which loses nothing."""
    chance = torch.Generator().manual_seed(5)
    return fit_low_rank(torch.randn(200, WIDTH, generator=chance), WIDTH)


def pair(family: str, first: int, second: int, **options: Any) -> tuple[Whole, UShapedEdge]:
    model, head = model_of(family), head_of() if family == "bert" else None
    edge = split(model, first, second, head=head, **options)
    return Whole(model, copy.deepcopy(head)), edge


def gradients(whole: Whole, edge: UShapedEdge, first: int, second: int, language: bool) -> tuple[dict, dict, float]:
    mine = batches(0, language=language)
    cloud = edge.cloud.trainer  # type: ignore[attr-defined]
    losses = []
    theirs = caught(parts_of(whole, first, second), [whole.trainer], lambda: losses.append(whole.step(mine).loss))
    ours = caught(sides(edge), [edge.trainer, cloud.trainer], lambda: losses.append(edge.step(mine).loss))
    return ours, theirs, abs(losses[0] - losses[1]) / losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_whole_models_at_every_cut(family: str) -> None:
    assert {cut for cuts in SAMPLED.values() for cut in cuts} == {*EVERY_CUT}
    for first, second in SAMPLED[family]:
        code = full_rank if first % 2 else None
        whole, edge = pair(family, first, second, code=code)
        ours, theirs, off = gradients(whole, edge, first, second, family != "bert")
        assert off <= TOLERANCE, (first, second)
        assert distance(ours, theirs) <= TOLERANCE, (first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_codes_of_full_rank_at_both_cuts_they_are_the_whole_models(family: str) -> None:
    for first, second in CUTS:
        whole, edge = pair(family, first, second, code=full_rank, downlink_rank=WIDTH)
        cloud = edge.cloud.trainer  # type: ignore[attr-defined]
        assert edge.decoder.weight.detach().norm() > 1  # type: ignore[union-attr, operator]
        ours, theirs, off = gradients(whole, edge, first, second, family != "bert")
        assert off <= TOLERANCE, (first, second)
        assert distance(ours, theirs) <= TOLERANCE, (first, second)
        codes = (edge.encoder, edge.decoder, cloud.encoder, cloud.decoder)
        assert all(one.grad is not None and one.grad.norm() > 0 for end in codes for one in end.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_after_many_steps_are_the_whole_models(family: str) -> None:
    first, second = CUTS[FAMILIES.index(family) % len(CUTS)]
    whole, edge = pair(family, first, second, max_in_flight=4)
    before = values(sides(edge))
    for step in range(STEPS):
        mine = batches(step, language=family != "bert")
        theirs, ours = whole.step(mine), edge.step(mine)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    assert distance(values(sides(edge)), values(parts_of(whole, first, second))) <= TOLERANCE
    assert distance(values(sides(edge)), before) > 1e-2


def test_the_depth_of_the_pipeline_changes_no_bit() -> None:
    edges = [pair("gpt2-untied", 2, 4, max_in_flight=depth)[1] for depth in (1, 4, 9)]
    for edge in edges:
        for step in range(4):
            edge.step(batches(step, 4, language=True))
    one, *others = [values(sides(edge)) for edge in edges]
    for other in others:
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_dropout_is_on_in_every_part_and_off_in_prediction() -> None:
    """Dropout changes the loss of the same weights; predictions are deterministic."""
    _, edge = pair("bert", 2, 6)
    mine = batches(0, 1, language=False)
    cloud = edge.cloud.trainer  # type: ignore[attr-defined]
    loss = edge.step(mine).loss
    assert all(module.training for module in (edge.first, edge.last, edge.task.head, cloud.middle))
    _, quiet = pair("bert", 2, 6)
    for module in sides(quiet).values():
        for one in module.modules():
            if isinstance(one, torch.nn.Dropout):
                one.p = 0.0
    assert abs(quiet.step(mine).loss - loss) > 1e-4
    assert torch.equal(edge.predict(mine[0]), edge.predict(mine[0]))
    assert not cloud.middle.training


def test_only_pooled_rows_come_back_from_the_last_block() -> None:
    meter = Meter()
    _, edge = pair("bert", 3, 6, meter=meter)
    [batch] = batches(0, 1, language=False)
    edge.step([batch])
    tokens, texts = int(batch.valid.sum()), len(batch.ids)
    for kind, rows in (("FWD", tokens), ("BWD_OK", tokens), ("FWD_OK", texts), ("BWD", texts)):
        around = meter.payload[kind] - 4 * WIDTH * rows
        assert 80 < around < 80 + 120, kind
