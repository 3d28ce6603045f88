"""Prompts with answers as samples: what an edge without labels gets holds no token of an answer."""

from __future__ import annotations

import torch

from raycloud.data.batches import Sample
from raycloud.retrain.domain_texts import prompted
from raycloud.retrain.samples import IGNORE

PAD = 9
SAMPLES = [Sample((1, 2, 3, 4, 5), 3), Sample((6, 7, 8), 2)]


def test_labelled_samples_predict_the_tokens_of_answers() -> None:
    found = prompted(SAMPLES, 6, PAD, "labels")
    assert found.inputs["input_ids"].tolist() == [[1, 2, 3, 4, 5, PAD], [6, 7, 8, PAD, PAD, PAD]]
    assert found.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
    assert [row[row != IGNORE].tolist() for row in found.labels] == [[4, 5], [8]]
    assert found.labels[0, 2:4].tolist() == [4, 5]  # each at the position before its token


def test_without_labels_answers_are_cut_off_and_prompts_predict_themselves() -> None:
    found = prompted(SAMPLES, 6, PAD, "none")
    assert found.inputs["input_ids"].tolist() == [[1, 2, 3, PAD, PAD, PAD], [6, 7, PAD, PAD, PAD, PAD]]
    assert found.inputs["attention_mask"].sum(1).tolist() == [3, 2]
    assert [row[row != IGNORE].tolist() for row in found.labels] == [[2, 3], [7]]
    other = [Sample((1, 2, 3, 0, 0), 3), Sample((6, 7, 0), 2)]
    assert torch.equal(found.labels, prompted(other, 6, PAD, "none").labels)
