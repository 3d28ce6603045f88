"""Requests as bytes: batches survive packing, and those that no teacher can answer are not sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.data.batches import IGNORE, Batch, Sample, collate
from raycloud.distill.signals.remote import SignalClient
from raycloud.distill.signals.remote.messages import pack_batch, unpack_batch
from raycloud.errors import DataError
from tests.distill.signals.remote.wiring import LIMITS, asked


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 9)), min_size=1, max_size=6), st.integers(2, 70_000))
def test_a_batch_survives_packing(shapes: list[tuple[int, int]], words: int) -> None:
    random = np.random.default_rng(words)
    samples = [
        Sample(tuple(random.integers(0, words, size).tolist()), min(prompt, size - 1)) for size, prompt in shapes
    ]
    packed = unpack_batch(*pack_batch(collate(samples, pad=1), words), words)
    expected = collate(samples, pad=0)
    assert torch.equal(packed.ids, expected.ids) and torch.equal(packed.labels, expected.labels)
    assert torch.equal(packed.valid, expected.valid)


def test_only_batches_a_teacher_can_answer_are_sent(batch: Batch) -> None:
    with pytest.raises(DataError, match=r"^a batch holds ids 0 to \d+; the teacher's are 0 to 49$"):
        pack_batch(batch, 50)
    with pytest.raises(DataError, match="padded on the right"):
        pack_batch(Batch(batch.ids, batch.valid.flip(1), batch.labels), 97)
    with pytest.raises(DataError, match="next tokens as labels"):
        pack_batch(Batch(batch.ids, batch.valid, torch.where(batch.labels == IGNORE, IGNORE, 0)), 97)


def test_a_batch_too_large_is_refused_before_it_is_sent(link: SignalClient, batch: Batch) -> None:
    ask, _ = asked(link, batch)
    assert link.info.request_bytes == 4 * LIMITS.tokens
    with pytest.raises(DataError, match=r"^a batch of 961 bytes; the teacher takes at most 960$"):
        link.ask(ask, bytes(961), 100)
    assert link.meter.messages["SIGNAL"] == 0
