"""One data set in the tokens of two models: samples of both, partners of tokens, and the map between the
vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Batch, Sample, collate, encode_for_two
from raycloud.data.prompts import Format, bounds_of
from raycloud.data.splits import Row
from raycloud.distill.alignment.byte_spans import Alignment, align_texts
from raycloud.distill.alignment.vocabulary import VocabularyMap
from raycloud.distill.objective import SharedVocabulary, TeacherOutput, TokenIds
from raycloud.distill.ragged import text_of
from raycloud.distill.signals import FrozenHead, Signal
from raycloud.models.texts import Bos


@dataclass(frozen=True)
class DeviceVocabularyMap:
    """Map between the vocabularies on a device, in the form that objectives need."""

    map: VocabularyMap
    device: torch.device

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student ids, teacher ids and weights, (e,) each."""
        teacher = text_of(self.map.offsets)
        return tuple(one.to(self.device) for one in (self.map.student_ids.long(), teacher, self.map.weights))  # type: ignore[return-value]

    @cached_property
    def shared(self) -> tuple[Tensor, Tensor]:
        """Student and teacher ids (s,) with the same bytes or the same special role."""
        same = (self.map.distances == 0).to(self.device)
        student_ids, teacher_ids, _ = self.entries
        return student_ids[same], teacher_ids[same]


class AlignedSamples:
    """Samples of the same rows for student and teacher, aligned once.

    Args:
        rows: rows that leave nothing to predict on either side are dropped.
        student: tokenizer of the student.
        teacher: tokenizer of the teacher.
        form: prompt format; each side uses its own template.
        max_length: maximum number of tokens of prompt and response, on either side.
        max_prompt_length: maximum number of prompt tokens.
        bos: whether texts begin with BOS.

    Raises:
        DataError: no sample is left, or the bytes of a tokenizer cannot be determined.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        form: Format,
        *,
        max_length: int,
        max_prompt_length: int,
        bos: Bos = "auto",
    ) -> None:
        self._pads = (int(student.pad_token_id), int(teacher.pad_token_id))
        self.student, self.teacher, texts, self.counts = encode_for_two(
            rows, (student, teacher), form, max_length=max_length, max_prompt_length=max_prompt_length, bos=bos
        )
        ours, theirs = ([sample.ids[sample.prompt :] for sample in side] for side in (self.student, self.teacher))
        self.alignment: Alignment = align_texts(texts, ours, theirs, student, teacher)
        ours_end, theirs_end = (bounds_of(one, form, bos).answer_end for one in (student, teacher))
        self.answer_ends = (ours_end, theirs_end)
        """Ids of both sides that end an answer; None if a tokenizer has none."""
        self.map = VocabularyMap.build(student, teacher, ends=self.answer_ends)

    def batches(self, sample_indices: Sequence[int]) -> tuple[Batch, Batch]:
        """Student batch and teacher batch of some samples."""
        ours, theirs = (
            collate([side[index] for index in sample_indices], pad)
            for side, pad in zip((self.student, self.teacher), self._pads, strict=True)
        )
        return ours, theirs

    def partners(self, sample_indices: Sequence[int]) -> Tensor:
        """Teacher token with exactly the same bytes, or -1, (n,), for every labelled student token of a batch."""
        chosen = self.alignment.select(sample_indices)
        partner = torch.full((int(chosen.student_offsets[-1]),), -1)
        pairs = chosen.pairs.long()
        partner[pairs[:, 0]] = pairs[:, 1]
        ours = _labelled(chosen.student_offsets, [self.student[index] for index in sample_indices])
        theirs = _labelled(chosen.teacher_offsets, [self.teacher[index] for index in sample_indices])
        # Without a prompt nothing predicts a text's first token, and later tokens move up by one.
        moved = torch.where(theirs, theirs.cumsum(0) - 1, -1)
        return torch.where(partner >= 0, moved[partner.clamp_min(0)], -1)[ours]

    def output(
        self,
        sample_indices: Sequence[int],
        signal: Signal,
        head: FrozenHead | None,
        vocabulary: SharedVocabulary,
        embedding: Tensor | None = None,
    ) -> TeacherOutput:
        """Teacher outputs for some samples, in the form that objectives need.

        Args:
            sample_indices: sample indices of the batch.
            signal: signal for the teacher's batch of these samples, on the student's device.
            head: required for hidden signals.
            vocabulary: map between both vocabularies.
            embedding: input embedding (W, D) of the teacher, for objectives that use token embeddings.
        """
        device = signal.payload["rows"].device
        batch = self.batches(sample_indices)[1].to(device)
        return TeacherOutput(
            signal,
            head,
            self.partners(sample_indices).to(device),
            TokenIds.of(batch),
            embedding,
            vocabulary,
            tuple(one.to(device) for one in self._spans(sample_indices)),  # type: ignore[arg-type]
        )

    def _spans(self, sample_indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Byte spans of both sides' labelled tokens within their responses."""
        chosen = self.alignment.select(sample_indices)
        ours = _spans(chosen.student_ends, chosen.student_offsets, [self.student[index] for index in sample_indices])
        theirs = _spans(chosen.teacher_ends, chosen.teacher_offsets, [self.teacher[index] for index in sample_indices])
        return ours, theirs


def _spans(ends: Tensor, offsets: Tensor, samples: Sequence[Sample]) -> Tensor:
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    begins[offsets[:-1].long()] = 0
    return torch.stack([begins, ends], dim=1).long()[_labelled(offsets, samples)]


def _labelled(offsets: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Mask of the response tokens that are predicted from an earlier token (n,)."""
    labelled = torch.ones(int(offsets[-1]), dtype=torch.bool)
    bare = torch.tensor([sample.prompt == 0 for sample in samples])
    labelled[offsets[:-1].long()[bare]] = False
    return labelled
