"""An edge's own part of the data, in the tokens of its student and of the teacher."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from raycloud.data.batches import Sample, Tally, collate, encode_tallied
from raycloud.data.sources import training_rows
from raycloud.data.splits import select, shard
from raycloud.distill.pairs import Pairs
from raycloud.distill.recipe import DistillRecipe, EdgeRecipe
from raycloud.distill.signal_file import Origin, tokenizer_fingerprint
from raycloud.distill.student import Lesson, own_tokenizer


def origin_of(recipe: DistillRecipe, teacher: str, tokenizer: PreTrainedTokenizerBase) -> Origin:
    """What the signals that a run keeps in a folder must be of.

    Args:
        recipe: of the run.
        teacher: its name with a fingerprint of its weights.
        tokenizer: the teacher's.
    """
    return Origin(teacher, tokenizer_fingerprint(tokenizer), recipe.signal, recipe.temperatures)


@dataclass(frozen=True)
class Shard:
    """Samples of the same rows for student and teacher."""

    samples: list[Sample]
    """The student's."""
    asked: list[Sample]
    """The teacher's; the same ones where both have one tokenizer."""
    pairs: Pairs | None
    """How they belong together, where both have tokenizers of their own."""
    own: PreTrainedTokenizerBase | None
    """The student's tokenizer, where it is another than the teacher's."""
    pad: int
    """The student's padding where ``pairs`` does not know it."""
    tally: Tally
    """What became of the rows."""

    @classmethod
    def of(cls, recipe: DistillRecipe, edge: EdgeRecipe, teacher: PreTrainedTokenizerBase) -> Shard:
        """That of an edge.

        Raises:
            DataError: it is empty.
            ModelError: the student's tokenizer cannot be loaded.
        """
        data = recipe.data
        rows = shard(select(training_rows(data), edge.where), edge.part, edge.of)
        lengths = {"max_length": data.max_length, "max_prompt": data.max_prompt}
        own = own_tokenizer(recipe.cohort_of(edge).student, teacher)
        if own is None:
            samples, tally = encode_tallied(rows, teacher, data.format, **lengths)
            return cls(samples, samples, None, None, teacher.pad_token_id, tally)
        pairs = Pairs(rows, own, teacher, data.format, **lengths)
        return cls(pairs.student, pairs.teacher, pairs, own, own.pad_token_id, pairs.tally)

    def lesson(self, which: list[int]) -> Lesson:
        """A micro-batch of some samples."""
        if self.pairs is not None:
            return Lesson(*self.pairs.batches(which), tuple(which))
        batch = collate([self.samples[index] for index in which], self.pad)
        return Lesson(batch, batch, tuple(which))
