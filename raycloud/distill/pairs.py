"""One data set in the tokens of two models: samples of both, which token stands for which, and which word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Batch, Sample, collate, encode_both
from raycloud.data.prompts import Format
from raycloud.data.splits import Row
from raycloud.distill.alignment import Alignment, align_texts
from raycloud.distill.objective import Ids, TeacherOutput, Vocabularies
from raycloud.distill.ragged import text_of
from raycloud.distill.signals import FrozenHead, Signal
from raycloud.distill.vocabulary import VocabularyMap


@dataclass(frozen=True)
class Words:
    """A :class:`~raycloud.distill.vocabulary.VocabularyMap` as objectives ask for it."""

    map: VocabularyMap
    device: torch.device

    @cached_property
    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student ids, teacher ids and weights (e,)."""
        teacher = text_of(self.map.offsets)
        return tuple(one.to(self.device) for one in (self.map.student_ids.long(), teacher, self.map.weights))  # type: ignore[return-value]

    @cached_property
    def shared(self) -> tuple[Tensor, Tensor]:
        """Student and teacher ids (s,) of the same bytes or the same role."""
        same = (self.map.distances == 0).to(self.device)
        mine, theirs, _ = self.edges
        return mine[same], theirs[same]


class Pairs:
    """Samples of the same rows for student and teacher, aligned once.

    Args:
        rows: those that leave nothing to predict for either are dropped.
        student: the student's tokenizer.
        teacher: the teacher's.
        form: of the prompts; each side has its own template.
        max_length: tokens of prompt and response, on either side.
        max_prompt: tokens of the prompt.

    Raises:
        DataError: nothing is left, or a tokenizer's bytes are not known.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        form: Format,
        *,
        max_length: int,
        max_prompt: int,
    ) -> None:
        self._pads = (int(student.pad_token_id), int(teacher.pad_token_id))
        self.student, self.teacher, texts, self.tally = encode_both(
            rows, (student, teacher), form, max_length=max_length, max_prompt=max_prompt
        )
        ours, theirs = ([sample.ids[sample.prompt :] for sample in side] for side in (self.student, self.teacher))
        self.alignment: Alignment = align_texts(texts, ours, theirs, student, teacher)
        self.map = VocabularyMap.build(student, teacher)

    def batches(self, which: Sequence[int]) -> tuple[Batch, Batch]:
        """The student's and the teacher's batch of some samples."""
        ours, theirs = (
            collate([side[index] for index in which], pad)
            for side, pad in zip((self.student, self.teacher), self._pads, strict=True)
        )
        return ours, theirs

    def partners(self, which: Sequence[int]) -> Tensor:
        """For every labelled token of the student in a batch, the teacher's of exactly the same bytes, or -1 (n,)."""
        chosen = self.alignment.select(which)
        partner = torch.full((int(chosen.student_offsets[-1]),), -1)
        pairs = chosen.pairs.long()
        partner[pairs[:, 0]] = pairs[:, 1]
        ours = _labelled(chosen.student_offsets, [self.student[index] for index in which])
        theirs = _labelled(chosen.teacher_offsets, [self.teacher[index] for index in which])
        # Without a prompt nothing predicts a text's first token, and what follows moves up.
        moved = torch.where(theirs, theirs.cumsum(0) - 1, -1)
        return torch.where(partner >= 0, moved[partner.clamp_min(0)], -1)[ours]

    def output(
        self,
        which: Sequence[int],
        signal: Signal,
        head: FrozenHead | None,
        words: Vocabularies,
        embedding: Tensor | None = None,
    ) -> TeacherOutput:
        """What the teacher says about some samples, as the student's objectives need it.

        Args:
            which: samples of the batch.
            signal: for the teacher's batch of them, on the device of the student.
            head: for hidden signals.
            words: of both vocabularies.
            embedding: the teacher's (W, D), for objectives that look at the tokens.
        """
        device = signal.payload["rows"].device
        batch = self.batches(which)[1].to(device)
        return TeacherOutput(
            signal,
            head,
            self.partners(which).to(device),
            Ids.of(batch),
            embedding,
            words,
            tuple(one.to(device) for one in self._spans(which)),  # type: ignore[arg-type]
        )

    def _spans(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Byte spans of both sides' labelled tokens within their responses."""
        chosen = self.alignment.select(which)
        ours = _spans(chosen.student_ends, chosen.student_offsets, [self.student[index] for index in which])
        theirs = _spans(chosen.teacher_ends, chosen.teacher_offsets, [self.teacher[index] for index in which])
        return ours, theirs


def _spans(ends: Tensor, offsets: Tensor, samples: Sequence[Sample]) -> Tensor:
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    begins[offsets[:-1].long()] = 0
    return torch.stack([begins, ends], dim=1).long()[_labelled(offsets, samples)]


def _labelled(offsets: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Which response tokens are predicted from something (n,)."""
    told = torch.ones(int(offsets[-1]), dtype=torch.bool)
    bare = torch.tensor([sample.prompt == 0 for sample in samples])
    told[offsets[:-1].long()[bare]] = False
    return told
