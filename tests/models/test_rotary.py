"""Rotary angles that depend on the length of the text: prompts in chunks equal those in one piece."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from raycloud.models.rotary import fixed_rope_length
from raycloud.models.segments import Segment
from raycloud.split.inference.blocks import LocalBlocks, cloud_stage
from raycloud.split.inference.generation import SplitTokenSource
from raycloud.split.plan import PlanSet, SplitPlan
from tests.models.families import tiny

STEADY = 32
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 4.0, 9.0, 20.0],
    "original_max_position_embeddings": STEADY,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {"rope_parameters": LONG, "max_position_embeddings": 128},
    "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": STEADY},
}


def model_of(family: str, rope: str) -> PreTrainedModel:
    return tiny(family, **ROPES[rope])


def ids_of(length: int) -> list[int]:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def split(model: PreTrainedModel, first: int, second: int, **options: Any) -> SplitTokenSource:
    plans = PlanSet.of(SplitPlan(first, second))
    middle = Segment(model, first, second, embed=False, head=False)
    return SplitTokenSource(
        Segment(model, 0, first, embed=True, head=False),
        Segment(model, second, embed=False, head=True),
        lambda: LocalBlocks(cloud_stage(middle, plans, 6)),
        plans,
        chunk=8,
        max_length=128,
        **options,
    )


def prefilled(model: SplitTokenSource, ids: list[int]) -> Tensor:
    """Compute the logits of the last token of a prompt."""
    pipeline = model.open()
    try:
        *_, logits = model._prefill(pipeline, torch.tensor([ids]))
        return logits[0, -1]
    finally:
        pipeline.close()


@pytest.mark.parametrize("length", [20, STEADY, STEADY + 1, 70])
@pytest.mark.parametrize(("first", "second"), [(2, 4), (6, 6)])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_prompt_in_pieces_says_what_stock_says_in_one_call(
    family: str, rope: str, first: int, second: int, length: int
) -> None:
    model, ids = model_of(family, rope), ids_of(length)
    with torch.no_grad():
        reference = copy.deepcopy(model)(input_ids=torch.tensor([ids])).logits[0, -1]
    ours = split(model, first, second)
    assert float((prefilled(ours, ids) - reference).norm() / reference.norm()) < 1e-5
    # A longer text before it changes nothing, whoever's it was.
    prefilled(ours, ids_of(100))
    assert float((prefilled(ours, ids) - reference).norm() / reference.norm()) < 1e-5


@pytest.mark.parametrize("rope", ROPES)
def test_a_continuation_across_the_steady_length_is_that_of_stock(rope: str) -> None:
    model, prompt = model_of("llama", rope), ids_of(STEADY - 6)
    made = copy.deepcopy(model).generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0
    )
    assert list(split(model, 2, 4).stream(prompt, 16)) == made[0, len(prompt) :].tolist()


def test_a_batch_says_of_each_text_what_it_says_alone() -> None:
    """transformers uses one set of angles for a batch, that of its longest text."""
    model = split(model_of("llama", "longrope"), 2, 4)
    prompts = [ids_of(12), ids_of(60)]
    assert model.generate(prompts, 8) == [list(model.stream(prompt, 8)) for prompt in prompts]


def test_the_steady_length_is_that_of_the_parameters() -> None:
    assert fixed_rope_length(tiny("llama").config) is None
    assert fixed_rope_length(tiny("gemma3").config) is None
    assert fixed_rope_length(tiny("gpt2").config) is None
    assert [fixed_rope_length(model_of("llama", rope).config) for rope in ROPES] == [STEADY, STEADY]


def test_several_plans_and_links_stay_within_the_steady_length() -> None:
    from raycloud.split.inference.limits import InferenceLimits

    model = model_of("llama", "longrope")
    first = Segment(model, 0, 3, embed=True, head=False)
    last = Segment(model, 3, embed=False, head=True)
    drawn = SplitTokenSource(first, last, lambda: None, PlanSet((1, 2, 3), (3,)))  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match=f"exceed {STEADY} tokens"):
        drawn.stream(ids_of(STEADY), 1)
    assert InferenceLimits().longest(model.config) == STEADY
    assert InferenceLimits().longest(tiny("llama").config) == 128
