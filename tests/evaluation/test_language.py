"""Perplexity and agreement against the stock model, whatever the batches."""

from __future__ import annotations

import math

import pytest
import torch

from raycloud.data.batches import Sample, collate, in_length_order
from raycloud.evaluation.language import Judgement, judge
from raycloud.models.segments import Segment
from tests.models.families import tiny

SAMPLES = [Sample(tuple(range(5, 5 + n)), n // 3) for n in (4, 9, 17, 30, 6)]


def test_perplexity_equals_the_stock_models_loss() -> None:
    model = tiny("qwen2")
    judged = judge(Segment(model), in_length_order(SAMPLES, 2, pad=0), chunk=5)
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in SAMPLES:
            ids = torch.tensor([sample.ids])
            log_p = model(input_ids=ids).logits.log_softmax(-1)[0]
            for at in range(max(sample.prompt, 1), len(sample.ids)):
                total -= float(log_p[at - 1, sample.ids[at]])
                count += 1
    assert len(judged.nll) == count
    assert judged.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_agreement_does_not_depend_on_the_batches() -> None:
    one, other = Segment(tiny("llama", seed=0)), Segment(tiny("llama", seed=1))
    single = [collate([sample], 0) for sample in sorted(SAMPLES, key=lambda s: len(s.ids))]
    grouped = in_length_order(SAMPLES, 3, 0)
    assert judge(one, single).agreement(judge(one, grouped)) == 1.0
    assert judge(one, single).agreement(judge(other, grouped)) < 0.5


def test_judgements_join() -> None:
    parts = [Judgement(torch.ones(2), torch.tensor([1, 2])), Judgement(torch.zeros(2), torch.tensor([3, 4]))]
    joined = Judgement.join(parts)
    assert joined.perplexity == pytest.approx(math.exp(0.5))
    assert joined.agreement(Judgement(torch.zeros(4), torch.tensor([1, 2, 0, 0]))) == 0.5
