"""Perplexity and agreement against the stock model, for any batches."""

from __future__ import annotations

import math

import pytest
import torch

from raycloud.data.batches import Sample, collate, length_sorted_batches
from raycloud.evaluation.perplexity import TokenPredictions, predict
from raycloud.models.segments import Segment
from tests.models.families import tiny

SAMPLES = [Sample(tuple(range(5, 5 + n)), n // 3) for n in (4, 9, 17, 30, 6)]


def test_perplexity_equals_the_stock_models_loss() -> None:
    model = tiny("qwen2")
    predicted = predict(Segment(model), length_sorted_batches(SAMPLES, 2, pad=0), chunk=5)
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in SAMPLES:
            ids = torch.tensor([sample.ids])
            log_p = model(input_ids=ids).logits.log_softmax(-1)[0]
            for at in range(max(sample.prompt, 1), len(sample.ids)):
                total -= float(log_p[at - 1, sample.ids[at]])
                count += 1
    assert len(predicted.nll) == count
    assert predicted.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_agreement_does_not_depend_on_the_batches() -> None:
    one, other = Segment(tiny("llama", seed=0)), Segment(tiny("llama", seed=1))
    single = [collate([sample], 0) for sample in sorted(SAMPLES, key=lambda s: len(s.ids))]
    grouped = length_sorted_batches(SAMPLES, 3, 0)
    assert predict(one, single).agreement(predict(one, grouped)) == 1.0
    assert predict(one, single).agreement(predict(other, grouped)) < 0.5


def test_judgements_join() -> None:
    parts = [
        TokenPredictions(torch.ones(2), torch.tensor([1, 2])),
        TokenPredictions(torch.zeros(2), torch.tensor([3, 4])),
    ]
    joined = TokenPredictions.join(parts)
    assert joined.perplexity == pytest.approx(math.exp(0.5))
    assert joined.agreement(TokenPredictions(torch.zeros(4), torch.tensor([1, 2, 0, 0]))) == 0.5
