"""Requests and answers as bytes: batches survive packing, and large answers come in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raycloud.data.batches import IGNORE, Batch, Sample, collate
from raycloud.distill.signal_link import TeacherLink
from raycloud.distill.signal_link.messages import PART_BYTES, Told, pack_batch, told, unpack_batch
from raycloud.errors import DataError
from raycloud.link.frames import FrameError, split_off, unpack
from tests.distill.signal_link.wiring import asked


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


def test_large_answers_come_in_parts_a_socket_takes(link: TeacherLink) -> None:
    content = bytes(range(256)) * (PART_BYTES // 64) + b"end"
    frames = list(told(5, Told(key="k", nbytes=len(content)), content))
    assert max(len(frame.pack()) for frame in frames) < 2 * PART_BYTES
    head, first = split_off(unpack(frames[0].pack()), Told)
    assert first + b"".join(frame.payload for frame in frames[1:]) == content and head.nbytes == len(content)
    assert {frame.seq for frame in frames} == {5}


def test_a_frame_too_large_is_refused_before_it_is_sent(link: TeacherLink, batch: Batch) -> None:
    ask, _ = asked(link, batch)
    with pytest.raises(FrameError, match="exceeds"):
        link.ask(ask, bytes(9 * 2**20), 100)
