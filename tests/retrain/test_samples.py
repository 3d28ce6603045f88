"""Samples of a window: some of them stand for all."""

from __future__ import annotations

import torch

from raycloud.retrain.samples import Samples


def test_some_samples_of_a_sorted_file_have_all_its_classes_in_mixed_order() -> None:
    labels = torch.arange(4).repeat_interleave(50)
    samples = Samples({"input_ids": torch.arange(200)[:, None]}, labels)
    some, whole = samples.at_most(80), samples.at_most(200)
    assert len(some) == 80 and some.labels.bincount(minlength=4).min() >= 10
    assert torch.equal(labels[some.inputs["input_ids"].flatten()], some.labels)
    assert torch.equal(some.labels, samples.at_most(80).labels) and torch.equal(whole.labels[:80], some.labels)
    assert whole.inputs["input_ids"].flatten().sort().values.tolist() == list(range(200))
    assert all(len(set(chunk.tolist())) > 1 for chunk in whole.labels.split(20))
