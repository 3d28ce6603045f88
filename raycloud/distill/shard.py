"""One edge's part of the data, in the tokens of its student and of the teacher."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import RowCounts, Sample, collate, encode_counted
from raycloud.data.sources import training_rows
from raycloud.data.splits import select, shard
from raycloud.distill.alignment.pairs import AlignedSamples
from raycloud.distill.recipe import DistillEdgeRecipe, DistillRecipe
from raycloud.distill.signals.file import SignalSource, tokenizer_fingerprint
from raycloud.distill.student import DistillMicroBatch, differing_tokenizer


def signal_source(recipe: DistillRecipe, teacher: str, tokenizer: PreTrainedTokenizerBase) -> SignalSource:
    """Identity of the signals that a run keeps in a folder.

    Args:
        recipe: recipe of the run.
        teacher: the teacher's name with a fingerprint of its weights.
        tokenizer: tokenizer of the teacher.
    """
    return SignalSource(teacher, tokenizer_fingerprint(tokenizer), recipe.signal, recipe.temperatures)


@dataclass(frozen=True)
class Shard:
    """Samples of the same rows for student and teacher."""

    student_samples: list[Sample]
    """Samples in the student's tokens."""
    teacher_samples: list[Sample]
    """Samples in the teacher's tokens; the same list if both use one tokenizer."""
    pairs: AlignedSamples | None
    """Alignment of the two sides; None if both use one tokenizer."""
    student_tokenizer: PreTrainedTokenizerBase | None
    """The student's tokenizer if it differs from the teacher's."""
    pad: int
    """Padding id of the student's batches, used when ``pairs`` is None."""
    counts: RowCounts
    """Counts of kept, dropped and shortened rows."""

    @classmethod
    def of(cls, recipe: DistillRecipe, edge: DistillEdgeRecipe, teacher: PreTrainedTokenizerBase) -> Shard:
        """Encode the data of an edge.

        Raises:
            DataError: no sample is left.
            ModelError: the student's tokenizer cannot be loaded.
        """
        data = recipe.data
        rows = shard(select(training_rows(data), edge.where), edge.part, edge.of)
        limits = {"max_length": data.max_length, "max_prompt_length": data.max_prompt_length}
        own = differing_tokenizer(recipe.cohort_of(edge).student, teacher)
        if own is None:
            samples, counts = encode_counted(rows, teacher, data.format, bos=data.bos, **limits)
            return cls(samples, samples, None, None, teacher.pad_token_id, counts)
        pairs = AlignedSamples(rows, own, teacher, data.format, bos=data.bos, **limits)
        return cls(pairs.student, pairs.teacher, pairs, own, own.pad_token_id, pairs.counts)

    def micro_batch(self, sample_indices: list[int]) -> DistillMicroBatch:
        """Collate a micro-batch from sample indices."""
        if self.pairs is not None:
            return DistillMicroBatch(*self.pairs.batches(sample_indices), tuple(sample_indices))
        batch = collate([self.student_samples[index] for index in sample_indices], self.pad)
        return DistillMicroBatch(batch, batch, tuple(sample_indices))
