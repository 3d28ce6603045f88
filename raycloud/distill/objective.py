"""Base classes of objectives, their inputs and outputs, and the weighted sum of several objectives.

An objective is a function of the student's and the teacher's outputs at response tokens. It is stateless, except for
the parameters and buffers of its extras. It returns sums over tokens; the trainer divides by the number of student
tokens in the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from raycloud.data.batches import IGNORE, Batch
from raycloud.distill.head_loss import LogitsView, head_loss
from raycloud.distill.objective_options import ObjectiveOptions
from raycloud.distill.ragged import text_of
from raycloud.distill.signals import FrozenHead, Signal, Targets
from raycloud.models.segments import Segment
from raycloud.training.loop import Loss


@dataclass(frozen=True)
class TokenIds:
    """Labelled tokens of a batch in one tokenizer, flattened in the order (text, position)."""

    inputs: Tensor
    """(n,): the input token from which each label is predicted."""
    labels: Tensor
    """(n,)"""
    offsets: Tensor
    """(B + 1,): start of each text."""

    @classmethod
    def of(cls, batch: Batch) -> TokenIds:
        """Take the labelled tokens of a batch."""
        wanted = batch.labels != IGNORE
        ends = wanted.sum(dim=1).cumsum(dim=0)
        return cls(batch.ids[wanted], batch.labels[wanted], torch.cat([ends.new_zeros(1), ends]))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def texts(self) -> Tensor:
        """Index (n,) of the text that each token belongs to."""
        return text_of(self.offsets)

    @property
    def positions(self) -> Tensor:
        """Position (n,) of each token among the labelled tokens of its text."""
        return torch.arange(len(self), device=self.offsets.device) - self.offsets[self.texts]


@dataclass(frozen=True)
class StudentOutput:
    """Student outputs at the labelled positions of a batch: final hidden states (n, d), labels (n,), and the head."""

    hidden: Tensor
    labels: Tensor
    head: nn.Linear
    softcap: float | None = None
    ids: TokenIds | None = None
    embedding: Tensor | None = None
    """(V, d), for objectives that use token embeddings."""
    scale: float = 1.0
    """Factor of the head's output, such as one over Granite's ``logits_scaling``."""

    @classmethod
    def of(cls, student: Segment, batch: Batch) -> StudentOutput:
        """Run the student on a batch and keep the hidden states at labelled positions. No logits are computed here.

        Raises:
            ValueError: the student's head is not one linear layer.
        """
        if not isinstance(student.head, nn.Linear):
            raise ValueError("a student's head must be one linear map")
        wanted = batch.labels != IGNORE
        hidden = student.hidden(batch.ids, valid=None if bool(batch.valid.all()) else batch.valid)
        rule = student.structure.logits
        return cls(
            hidden[wanted],
            batch.labels[wanted],
            student.head,
            rule.cap(student.config),
            TokenIds.of(batch),
            token_embedding(student),
            rule.scale(student.config),
        )

    def logits_view(self, *, frozen: bool = False) -> LogitsView:
        """View of the hidden states and the head as logits."""
        return self.view_of(self.hidden, frozen=frozen)

    def view_of(self, hidden: Tensor, *, frozen: bool = False) -> LogitsView:
        """View of other hidden states (n, d) and the student's head as logits."""
        return LogitsView.of(hidden, self.head, self.softcap, self.scale, frozen=frozen)


def token_embedding(model: Segment) -> Tensor | None:
    """Input embedding (V, d) of a model, detached."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.weight.detach()
    return None


class SharedVocabulary(Protocol):
    """Correspondence between the entries of two vocabularies."""

    @property
    def shared(self) -> tuple[Tensor, Tensor]:
        """Student ids (s,) and teacher ids (s,) of the entries that both vocabularies have."""
        ...

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Student ids, teacher ids and weights, (e,) each: which share of a teacher id's probability goes to which
        student id."""
        ...


@dataclass(frozen=True)
class TeacherOutput:
    """Teacher outputs for the same texts, in the teacher's tokens.

    With one tokenizer its tokens are the student's. With two tokenizers ``partner`` maps each student token to the
    teacher token that stands for the same choice.
    """

    signal: Signal
    head: FrozenHead | None = None
    """Required with ``hidden`` signals."""
    partner: Tensor | None = None
    """(n,), -1 for a token without a partner; None if both models have the same tokens."""
    ids: TokenIds | None = None
    embedding: Tensor | None = None
    """(W, D)"""
    vocabulary: SharedVocabulary | None = None
    """None if both models have the same vocabulary."""
    spans: tuple[Tensor, Tensor] | None = None
    """Byte spans of the student's tokens (n, 2) and of the teacher's tokens (m, 2) within their texts."""

    def hidden(self, which: slice | Tensor = slice(None)) -> Tensor:
        """Final hidden states (c, D) at some of the teacher's tokens.

        Raises:
            ValueError: the signal is of another kind.
        """
        if self.signal.kind != "hidden":
            raise ValueError(f"this objective needs signals of kind 'hidden', got '{self.signal.kind}'")
        return self.signal.values(which)

    def logits(self, which: slice | Tensor = slice(None)) -> Tensor:
        """Logits (c, W) at some of the teacher's tokens.

        Raises:
            ValueError: the signal does not hold them.
        """
        if self.signal.kind == "logits":
            return self.signal.values(which)
        return self.frozen_head.logits(self.hidden(which))

    @property
    def frozen_head(self) -> FrozenHead:
        """Frozen copy of the teacher's head.

        Raises:
            ValueError: there is none.
        """
        if self.head is None:
            raise ValueError("a hidden signal needs the teacher's head")
        return self.head

    def logits_view(self) -> LogitsView:
        """View of the teacher's hidden states and head as logits."""
        return LogitsView(self.hidden(), self.frozen_head.weight, self.frozen_head.bias, self.frozen_head.softcap)


def both_ids(student: StudentOutput, teacher: TeacherOutput) -> tuple[TokenIds, TokenIds]:
    """Token ids of the student and of the teacher.

    Raises:
        ValueError: one of them is missing.
    """
    if student.ids is None or teacher.ids is None:
        raise ValueError("this objective needs the token ids of both models")
    return student.ids, teacher.ids


def same_position(student: TokenIds, teacher: TokenIds) -> Tensor:
    """Index (n,) of the teacher token at the same position in the text for every student token, -1 past the end.

    Published programs pair tokens in this way, although such tokens seldom cover the same bytes.
    """
    text, position = student.texts, student.positions
    return torch.where(position < teacher.offsets.diff()[text], teacher.offsets[text] + position, -1)


class TeacherAtTokens:
    """Teacher outputs at the tokens of one chunk. Nothing is decoded before it is asked for, and nothing is decoded
    twice.

    Args:
        teacher: outputs for the whole batch.
        which: selects the teacher's tokens.
        paired: see :attr:`paired`.
    """

    def __init__(self, teacher: TeacherOutput | None, which: slice | Tensor, paired: Tensor | None = None) -> None:
        self._teacher, self._which = teacher, which
        self.paired = paired
        """Indices (f,) of the chunk's student tokens that have a teacher token; None for all."""
        self._targets: dict[float, Targets] = {}
        self._logits: Tensor | None = None

    @property
    def teacher(self) -> TeacherOutput:
        """Teacher outputs for the whole batch.

        Raises:
            ValueError: there is no teacher.
        """
        if self._teacher is None:
            raise ValueError("this objective needs a teacher's signal")
        return self._teacher

    def __call__(self, temperature: float) -> Targets:
        """Targets at a temperature."""
        if temperature not in self._targets:
            with torch.no_grad():
                teacher = self.teacher
                self._targets[temperature] = teacher.signal.targets(self._which, temperature, teacher.head)
        return self._targets[temperature]

    def logits(self) -> Tensor:
        """Logits (c, W)."""
        if self._logits is None:
            with torch.no_grad():
                self._logits = self.teacher.logits(self._which)
        return self._logits


@dataclass(frozen=True)
class LossTerms:
    """Differentiable sum over tokens, and its parts as raw sums for the metrics log."""

    sum: Tensor
    parts: Mapping[str, Tensor]

    def scaled(self, by: float) -> LossTerms:
        """The sum and all parts multiplied by a number."""
        return LossTerms(self.sum * by, {name: value * by for name, value in self.parts.items()})


@dataclass(frozen=True)
class ModelSizes:
    """Inputs of trainable extras: hidden sizes of both models, and their heads and shared vocabulary where known."""

    student_hidden_size: int
    teacher_hidden_size: int
    student_head: Tensor | None = None
    teacher_head: Tensor | None = None
    vocabulary: SharedVocabulary | None = None


class Objective(ObjectiveOptions):
    """A loss on response tokens. Its options are its fields, and :attr:`needs` says what it needs."""

    def extras(self, sizes: ModelSizes) -> nn.Module | None:
        """Module that is trained beside the student, such as projectors; None if there is none.

        It stays at its edge: it is saved with the edge's optimizer state and is no part of the exported student.
        """
        return None

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> LossTerms:
        """Sum of the loss over a batch's tokens."""
        raise NotImplementedError


Registrable = TypeVar("Registrable", bound=Objective)
OBJECTIVES: dict[str, type[Objective]] = {}
"""Registry: the class that computes each objective that a recipe may name, by that name."""


def register(cls: type[Registrable]) -> type[Registrable]:
    """Class decorator that adds an objective to the registry under the default of its field ``name``."""
    OBJECTIVES[cls.model_fields["name"].default] = cls
    return cls


def build_objective(options: ObjectiveOptions) -> Objective:
    """Build the objective that a recipe names."""
    return options if isinstance(options, Objective) else OBJECTIVES[options.name](**options.model_dump())


class TokenObjective(Objective):
    """An objective that treats each token separately, so that several can share one pass over the student's logits."""

    def per_token(self, logits: Tensor, labels: Tensor, teacher: TeacherAtTokens) -> Tensor:
        """Loss of each token (c,), from logits (c, V), labels (c,) and the teacher's outputs there."""
        raise NotImplementedError

    @property
    def requires_partner(self) -> bool:
        """True if student tokens without a teacher token are skipped."""
        return True

    @property
    def by_position(self) -> bool:
        """True if tokens are paired by position in the text instead of by bytes."""
        return False


def weighted_sum(
    objectives: Sequence[tuple[float, Objective]],
    student: StudentOutput,
    teacher: TeacherOutput | None = None,
    extras: Mapping[str, nn.Module] | None = None,
    *,
    chunk: int = 64,
) -> Loss:
    """Weighted sum Σ weight · objective over all response tokens, with the raw sums by objective name.

    Args:
        objectives: weights and objectives.
        student: see :class:`StudentOutput`.
        teacher: outputs for the same texts; optional if no objective needs them.
        extras: trainable modules by objective name.
        chunk: number of tokens whose logits exist at a time.

    Raises:
        ValueError: the signal has another number of tokens than the batch, or an objective needs a signal and there is
            none.
    """
    count = len(student.labels)
    if teacher is not None and teacher.partner is None and teacher.signal.count != count:
        raise ValueError(f"the signal holds {teacher.signal.count} tokens, the batch has {count}")
    simple = [(weight, one) for weight, one in objectives if isinstance(one, TokenObjective)]
    total = student.hidden.new_zeros((), dtype=torch.promote_types(student.hidden.dtype, torch.float32))
    parts: dict[str, Tensor] = {}
    if simple:
        total, parts = _per_token_losses(simple, student, teacher, chunk)
    for weight, one in objectives:
        if isinstance(one, TokenObjective):
            continue
        if teacher is None:
            raise ValueError(f"objective '{one.name}' needs a teacher's signal")
        if one.needs.extras and one.name not in (extras or {}):
            raise ValueError(f"objective '{one.name}' needs the module that it trains beside the student")
        found = one.loss(student, teacher, (extras or {}).get(one.name), chunk=chunk)
        total = total + weight * found.sum
        parts[one.name] = found.sum.detach()
        parts |= {f"{one.name}/{name}": value for name, value in found.parts.items()}
    return Loss(total, count, parts, {one.name: weight for weight, one in objectives})


def _per_token_losses(
    objectives: Sequence[tuple[float, TokenObjective]],
    student: StudentOutput,
    teacher: TeacherOutput | None,
    chunk: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    partner = None if teacher is None else teacher.partner
    partners = {False: partner}
    if teacher is not None and partner is not None and any(one.by_position for _, one in objectives):
        partners[True] = same_position(*both_ids(student, teacher))

    def view(partner: Tensor | None, at: slice) -> TeacherAtTokens:
        if partner is None:
            return TeacherAtTokens(teacher, at)
        partner_here = partner[at]
        found = (partner_here >= 0).nonzero()[:, 0]
        return TeacherAtTokens(teacher, partner_here[found], found)

    def terms(logits: Tensor, at: slice) -> Tensor:
        views = {by_position: view(one, at) for by_position, one in partners.items()}

        def value(one: TokenObjective) -> Tensor:
            output = views[one.by_position and partner is not None]
            if output.paired is None or not one.requires_partner:
                return one.per_token(logits, student.labels[at], output).sum()
            return one.per_token(logits[output.paired], student.labels[at][output.paired], output).sum()

        return torch.stack([value(one) for _, one in objectives])

    weights = torch.tensor([weight for weight, _ in objectives], dtype=torch.float64, device=student.hidden.device)
    total, sums = head_loss([student.logits_view()], terms, weights, chunk=chunk)
    return total, {one.name: value for (_, one), value in zip(objectives, sums, strict=True)}
