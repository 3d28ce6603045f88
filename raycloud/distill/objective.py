"""What an objective is, and the weighted sum of several.

Every objective is a pure function of what the student and the teacher say about response tokens, and yields sums over
them; the trainer divides by the number of the student's tokens in the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from raycloud.data.batches import IGNORE, Batch
from raycloud.distill.head_loss import Lane, head_loss
from raycloud.distill.ragged import text_of
from raycloud.distill.signals import FrozenHead, Signal, SignalKind, Targets
from raycloud.models.segments import Segment
from raycloud.recipe import Recipe
from raycloud.training.loop import Loss

Compat = Literal["ours", "published"]
"""Whether an objective is as we think it should be, or as the published program has it."""


@dataclass(frozen=True)
class Ids:
    """The labelled tokens of a batch as one side's tokenizer has them, row-major over (text, position)."""

    inputs: Tensor
    """(n,): the token each of them is predicted from."""
    labels: Tensor
    """(n,)"""
    offsets: Tensor
    """(B + 1,): where each text begins."""

    @classmethod
    def of(cls, batch: Batch) -> Ids:
        """Those of a batch."""
        wanted = batch.labels != IGNORE
        ends = wanted.sum(dim=1).cumsum(dim=0)
        return cls(batch.ids[wanted], batch.labels[wanted], torch.cat([ends.new_zeros(1), ends]))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def texts(self) -> Tensor:
        """Which text each of them is of (n,)."""
        return text_of(self.offsets)

    @property
    def places(self) -> Tensor:
        """How many of them stand before each in its text (n,)."""
        return torch.arange(len(self), device=self.offsets.device) - self.offsets[self.texts]


@dataclass(frozen=True)
class StudentOutput:
    """The student at the labelled positions of a batch: final rows (n, d), labels (n,), and its head."""

    rows: Tensor
    labels: Tensor
    head: nn.Linear
    softcap: float | None = None
    ids: Ids | None = None
    embedding: Tensor | None = None
    """(V, d), for objectives that look at the tokens themselves."""

    @classmethod
    def of(cls, student: Segment, batch: Batch) -> StudentOutput:
        """Run the student over a batch and keep the labelled rows; nothing vocabulary-sized exists before that."""
        if not isinstance(student.head, nn.Linear):
            raise ValueError("a student's head must be one linear map")
        wanted = batch.labels != IGNORE
        rows = student.rows(batch.ids, valid=None if bool(batch.valid.all()) else batch.valid)
        softcap = getattr(student.config, "final_logit_softcapping", None)
        return cls(rows[wanted], batch.labels[wanted], student.head, softcap, Ids.of(batch), token_table(student))

    def lane(self, *, frozen: bool = False) -> Lane:
        """Its rows through its head."""
        return Lane.of(self.rows, self.head, self.softcap, frozen=frozen)


def token_table(model: Segment) -> Tensor | None:
    """The input embedding (V, d) of a model, without a gradient."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.weight.detach()
    return None


class Vocabularies(Protocol):
    """Which words of two vocabularies mean the same."""

    @property
    def shared(self) -> tuple[Tensor, Tensor]:
        """Student and teacher ids (s,), (s,) of the words that both have."""
        ...

    @property
    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student ids, teacher ids and weights (e,) each: where a teacher's word gives its probability to."""
        ...


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says about the same texts, in tokens of its own.

    With one tokenizer its tokens are the student's. With two, ``partner`` says for each of the student's which of its
    own stands for the same choice.
    """

    signal: Signal
    head: FrozenHead | None = None
    """For ``hidden`` signals."""
    partner: Tensor | None = None
    """(n,), -1 where there is none; None where both have the same tokens."""
    ids: Ids | None = None
    embedding: Tensor | None = None
    """(W, D)"""
    words: Vocabularies | None = None
    """None where both have the same vocabulary."""
    spans: tuple[Tensor, Tensor] | None = None
    """Byte spans of the student's (n, 2) and of its own tokens (m, 2) within their texts."""

    def rows(self, which: slice | Tensor = slice(None)) -> Tensor:
        """Final rows (c, D) of some of its tokens.

        Raises:
            ValueError: the signal is of another kind.
        """
        if self.signal.kind != "hidden":
            raise ValueError(f"this objective needs signals of kind 'hidden', got '{self.signal.kind}'")
        return self.signal.rows(which)

    def logits(self, which: slice | Tensor = slice(None)) -> Tensor:
        """Logits (c, W) of some of its tokens.

        Raises:
            ValueError: the signal does not hold them.
        """
        if self.signal.kind == "logits":
            return self.signal.rows(which)
        return self.frozen.logits(self.rows(which))

    @property
    def frozen(self) -> FrozenHead:
        """The copy of its head.

        Raises:
            ValueError: there is none.
        """
        if self.head is None:
            raise ValueError("a hidden signal needs the teacher's head")
        return self.head

    def lane(self) -> Lane:
        """Its rows through its head."""
        return Lane(self.rows(), self.frozen.weight, self.frozen.bias, self.frozen.softcap)


def both_ids(student: StudentOutput, teacher: TeacherOutput) -> tuple[Ids, Ids]:
    """The ids of both sides.

    Raises:
        ValueError: they are not there.
    """
    if student.ids is None or teacher.ids is None:
        raise ValueError("this objective needs the token ids of both models")
    return student.ids, teacher.ids


def same_place(ours: Ids, theirs: Ids) -> Tensor:
    """For every token of the student the teacher's at the same place in its text (n,), -1 past the end.

    Published programs compare so; the two seldom stand for the same bytes.
    """
    text, place = ours.texts, ours.places
    return torch.where(place < theirs.offsets.diff()[text], theirs.offsets[text] + place, -1)


class TeacherAt:
    """The teacher at the tokens at hand; nothing is decoded that nobody asks for, and nothing twice.

    Args:
        teacher: what it says of the whole batch.
        which: of its tokens.
        found: see :attr:`found`.
    """

    def __init__(self, teacher: TeacherOutput | None, which: slice | Tensor, found: Tensor | None = None) -> None:
        self._teacher, self._which = teacher, which
        self.found = found
        """Which of the student's tokens at hand have one of the teacher's (f,); None for all."""
        self._targets: dict[float, Targets] = {}
        self._logits: Tensor | None = None

    @property
    def teacher(self) -> TeacherOutput:
        """All that it says.

        Raises:
            ValueError: there is none.
        """
        if self._teacher is None:
            raise ValueError("this objective needs a teacher's signal")
        return self._teacher

    def __call__(self, temperature: float) -> Targets:
        """Its targets at a temperature."""
        if temperature not in self._targets:
            with torch.no_grad():
                teacher = self.teacher
                self._targets[temperature] = teacher.signal.targets(self._which, temperature, teacher.head)
        return self._targets[temperature]

    def logits(self) -> Tensor:
        """Its logits (c, W)."""
        if self._logits is None:
            with torch.no_grad():
                self._logits = self.teacher.logits(self._which)
        return self._logits


@dataclass(frozen=True)
class Terms:
    """A differentiable sum over tokens, and what it is made of, as raw sums for the log."""

    sum: Tensor
    parts: Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """What trainable extras depend on: widths and vocabularies of both models, and their heads where they are known."""

    student: int
    teacher: int
    student_head: Tensor | None = None
    teacher_head: Tensor | None = None
    words: Vocabularies | None = None


class Objective(Recipe):
    """A loss on response tokens; its options are its fields."""

    name: str
    kinds: ClassVar[tuple[SignalKind, ...]] = ("hidden",)
    """Signals that tell enough for it."""

    @property
    def signals(self) -> tuple[SignalKind, ...]:
        """Those of its :attr:`kinds` that do so with the options it has."""
        return self.kinds

    def extras(self, sizes: Sizes) -> nn.Module | None:
        """What is trained beside the student and saved with it, such as projectors; None if there is nothing."""
        return None

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> Terms:
        """Its sum over a batch's tokens."""
        raise NotImplementedError


class TokenObjective(Objective):
    """An objective that looks at one token at a time, so that several share one pass over the student's logits."""

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAt) -> Tensor:
        """The loss of each token (c,), from logits (c, V), labels (c,) and what the teacher says there."""
        raise NotImplementedError

    @property
    def needs_partner(self) -> bool:
        """Whether tokens without one of the teacher's are left out."""
        return True

    @property
    def by_place(self) -> bool:
        """Whether the teacher's tokens are those at the same place, and not those of the same bytes."""
        return False


def weighted_sum(
    objectives: Sequence[tuple[float, Objective]],
    student: StudentOutput,
    teacher: TeacherOutput | None = None,
    extras: Mapping[str, nn.Module] | None = None,
    *,
    chunk: int = 64,
) -> Loss:
    """Σ weight · objective over all response tokens; the terms are the raw sums by objective name.

    Args:
        objectives: weights and objectives.
        student: see :class:`StudentOutput`.
        teacher: for the same texts; not needed where no objective asks for it.
        extras: trainable modules by objective name.
        chunk: tokens whose logits exist at a time.

    Raises:
        ValueError: the signal speaks of another number of tokens, or an objective needs one and there is none.
    """
    count = len(student.labels)
    if teacher is not None and teacher.partner is None and teacher.signal.count != count:
        raise ValueError(f"the signal speaks of {teacher.signal.count} tokens, the batch has {count}")
    simple = [(weight, one) for weight, one in objectives if isinstance(one, TokenObjective)]
    total = student.rows.new_zeros((), dtype=torch.promote_types(student.rows.dtype, torch.float32))
    parts: dict[str, Tensor] = {}
    if simple:
        total, parts = _token_pass(simple, student, teacher, chunk)
    for weight, one in objectives:
        if isinstance(one, TokenObjective):
            continue
        if teacher is None:
            raise ValueError(f"objective '{one.name}' needs a teacher's signal")
        found = one.loss(student, teacher, (extras or {}).get(one.name), chunk=chunk)
        total = total + weight * found.sum
        parts[one.name] = found.sum.detach()
        parts |= {f"{one.name}/{name}": value for name, value in found.parts.items()}
    return Loss(total, count, parts, {one.name: weight for weight, one in objectives})


def _token_pass(
    objectives: Sequence[tuple[float, TokenObjective]],
    student: StudentOutput,
    teacher: TeacherOutput | None,
    chunk: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    partner = None if teacher is None else teacher.partner
    partners = {False: partner}
    if teacher is not None and partner is not None and any(one.by_place for _, one in objectives):
        partners[True] = same_place(*both_ids(student, teacher))

    def view(partner: Tensor | None, at: slice) -> TeacherAt:
        if partner is None:
            return TeacherAt(teacher, at)
        mine = partner[at]
        found = (mine >= 0).nonzero()[:, 0]
        return TeacherAt(teacher, mine[found], found)

    def terms(logits: Tensor, at: slice) -> Tensor:
        views = {by_place: view(one, at) for by_place, one in partners.items()}

        def value(one: TokenObjective) -> Tensor:
            said = views[one.by_place and partner is not None]
            if said.found is None or not one.needs_partner:
                return one.per_token(logits, student.labels[at], said).sum()
            return one.per_token(logits[said.found], student.labels[at][said.found], said).sum()

        return torch.stack([value(one) for _, one in objectives])

    weights = torch.tensor([weight for weight, _ in objectives], dtype=torch.float64, device=student.rows.device)
    total, sums = head_loss([student.lane()], terms, weights, chunk=chunk)
    return total, {one.name: value for (_, one), value in zip(objectives, sums, strict=True)}
