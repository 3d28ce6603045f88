"""Acceptance test of split inference on a few models; it fails for every known way to break the split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.benchmarks.split_exact import (
    Attention,
    Reference,
    all_plans,
    compare_plans,
    cut,
    drawn_plans,
    logits_agree,
    random_reference,
    text_agrees,
)
from raycloud.models.rotary import RotaryTable
from raycloud.models.segments import Segment
from raycloud.split.inference.blocks import CloudStage, LocalBlocks, StepRequest
from raycloud.split.inference.generation import SplitTokenSource
from raycloud.split.plan import PlanSet, SplitPlan

PLAN = PlanSet.of(SplitPlan(3, 6))


@cache
def known(family: str, attention: Attention, tied: bool = True) -> Reference:
    torch.set_num_threads(1)
    return random_reference(family, tied, attention)


@pytest.mark.parametrize(("family", "tied", "attention"), [("llama", True, "eager"), ("gemma3", False, "sdpa")])
def test_cut_models_say_what_whole_ones_say(family: str, tied: bool, attention: Attention) -> None:
    """Families of models that are not in the quick run of the benchmark."""
    found = compare_plans(known(family, attention, tied), lambda: None, pairs=3, drawn=3)
    assert (found.pairs, found.runs, found.mismatches) == (45, 6, 0)


def test_references_are_worth_comparing() -> None:
    found = known("qwen3", "eager")
    assert len(set(found.continuation)) >= 10
    assert found.text.shape[1] > 2 * found.model.config.sliding_window
    assert {*found.model.config.layer_types} == {"full_attention", "sliding_attention"}


def breaks(attention: Attention, make: Callable[..., SplitTokenSource] = cut) -> bool:
    """Tell whether the acceptance test detects a defect."""
    reference = known("llama", attention)
    try:
        return not (logits_agree(reference, PLAN, make) and text_agrees(reference, PLAN, make=make))
    except ValueError:
        return True


def middle_only(change: Callable[[Segment], None]) -> Callable[..., SplitTokenSource]:
    """Call ``cut`` after changing the middle segment of a copy of the model."""

    def make(model: PreTrainedModel, plans: PlanSet, **options: int) -> SplitTokenSource:
        made = cut(model, plans, **options)
        change(made._connect()._state._segments[0])  # type: ignore[attr-defined]
        return made

    return make


def test_nothing_breaks_it_unchanged() -> None:
    assert not breaks("eager") and not breaks("sdpa")


def test_a_missing_mask_breaks_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(middle: Segment) -> None:
        monkeypatch.setattr(middle._path, "_mask", lambda *_: None)

    assert breaks("eager", middle_only(unmasked))


def test_a_missing_mask_for_several_rows_breaks_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole prompt at once would hide the defect, because sdpa takes no mask for a causal prompt."""

    def unmasked(middle: Segment) -> None:
        monkeypatch.setattr(middle._path, "_mask", lambda *_: None)

    make = middle_only(unmasked)
    assert not logits_agree(known("llama", "sdpa"), PLAN, make)


def test_positions_that_restart_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RotaryTable.at

    def restarting(
        angles: RotaryTable, positions: range, tokens: int, kind: str, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        return plain(angles, range(len(positions)), tokens, kind, like)

    monkeypatch.setattr(RotaryTable, "at", restarting)
    assert breaks("eager") and breaks("sdpa")


def test_a_norm_in_the_middle_breaks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = known("llama", "sdpa").model, CloudStage.step

    def normed(state: CloudStage, trip: StepRequest) -> Tensor:
        return model.base_model.norm(plain(state, trip))

    monkeypatch.setattr(CloudStage, "step", normed)
    assert breaks("sdpa")


@pytest.mark.parametrize("shift", [0, 1])
def test_a_lost_row_breaks_it(monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """The defect is detected if a hidden state is missing or replaced by its neighbour."""
    plain = LocalBlocks.receive

    def losing(middle: LocalBlocks) -> Tensor:
        rows = plain(middle)
        if rows.shape[1] < 3:
            return rows
        return torch.cat([rows[:, :1], rows[:, :shift], rows[:, 2:]], dim=1)

    monkeypatch.setattr(LocalBlocks, "receive", losing)
    assert breaks("sdpa")


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_wrong_keep_breaks_rollback(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    """A rolled back text continues as if nothing had followed, unless one side drops a wrong number of tokens."""
    reference = known("llama", "sdpa")
    draft, kept = torch.tensor([[5, 6, 7, 8]]), 20

    def logits() -> Tensor:
        triad = cut(reference.model, PLAN).open()
        triad.advance(reference.text[:, :kept])
        triad.advance(draft)
        triad.rollback(kept)
        return triad.advance(reference.text[:, kept:], logits=reference.text.shape[1] - kept)

    def close(found: Tensor) -> bool:
        wanted = reference.logits[:, kept:]
        return bool((found - wanted).norm() / wanted.norm() < 1e-3)

    assert close(logits())
    plain = CloudStage.step

    def off(state: CloudStage, request: StepRequest) -> Tensor:
        if request.keep < state.tokens:
            state.rollback(request.keep + wrong)
            request = replace(request, keep=state.tokens)
        return plain(state, request)

    monkeypatch.setattr(CloudStage, "step", off)
    try:
        broken = not close(logits())
    except ValueError as error:  # it says which hidden states are missing
        broken = "missing" in str(error) or "do not follow" in str(error)
    assert broken


@pytest.mark.parametrize("plans", [PLAN, PlanSet.of(SplitPlan(0, 8)), drawn_plans(8, 1)[0]])
def test_ragged_batches_say_what_each_text_says_alone(plans: PlanSet) -> None:
    model = known("gemma3", "sdpa", False).model
    prompts = [list(range(3, 3 + length)) for length in (2, 9, 1, 23)]
    whole = cut(model, plans, chunk=5)
    together = whole.generate(prompts, 12)
    assert together == [list(whole.stream(prompt, 12)) for prompt in prompts]


def test_all_pairs_are_all() -> None:
    assert len(all_plans(8)) == 45
