"""Small case in float64 for every objective: two texts in the tokens of two models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raycloud.distill.objective import (
    ModelSizes,
    Objective,
    StudentOutput,
    TeacherOutput,
    TokenIds,
    same_position,
    weighted_sum,
)
from raycloud.distill.objectives.cross_entropy import CrossEntropy
from raycloud.distill.signals import FrozenHead, Signal
from raycloud.link.codecs.floats import CODECS
from raycloud.training.loop import Loss

V, W, D_S, D_T = 41, 53, 8, 12
OURS, THEIRS = (5, 7), (6, 4)
PARTNER = [0, -1, 2, 3, -1, 6, 7, -1, 8, -1, -1, 9]


@dataclass(frozen=True)
class Map:
    """Map between vocabularies: tokens 0 to 29 are shared, the teacher's 30 to 39 map to the student's 30, others
    to none."""

    @property
    def shared(self) -> tuple[Tensor, Tensor]:
        return torch.arange(30), torch.arange(30)

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        mine = torch.cat([torch.arange(30), torch.full((10,), 30)])
        return mine, torch.arange(40), torch.ones(40)


class Wide(Signal):
    """Make a hidden signal without compression of the hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("key", "hidden", "float32", {"rows": CODECS["float32"].encode(hidden.float())})
        object.__setattr__(self, "wide", hidden)

    def values(self, which: slice | Tensor = slice(None)) -> Tensor:
        return self.wide[which]  # type: ignore[attr-defined]


class Case:
    """Both models' tokens, hidden states, heads and embeddings; with ``same`` they have one tokenizer.

    Args:
        same: see above.
        lengths: tokens of the student's and of the teacher's texts.
        partner: of the student's tokens among the teacher's; where lengths are others than those of the module, those
            at the same place.
        same_bytes: all tokens of a text cover the same bytes.
        seed: of all numbers.
    """

    def __init__(
        self,
        *,
        same: bool = False,
        lengths: Sequence[Sequence[int]] = (OURS, THEIRS),
        partner: list[int] | None = None,
        same_bytes: bool = False,
        seed: int = 1,
    ) -> None:
        made = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=made).double()

        def ids(vocab_size: int, lengths: Sequence[int]) -> TokenIds:
            n = sum(lengths)
            offsets = torch.tensor([0, *lengths]).cumsum(0)
            return TokenIds(
                torch.randint(0, vocab_size, (n,), generator=made),
                torch.randint(0, vocab_size, (n,), generator=made),
                offsets,
            )

        self.same, self.seed, vocab_size = same, seed, V if same else W
        ours, theirs = ids(V, lengths[0]), ids(vocab_size, lengths[0] if same else lengths[1])
        if partner is None:
            partner = PARTNER if lengths == (OURS, THEIRS) else same_position(ours, theirs).tolist()
        self.partner = partner
        self.head = nn.Linear(D_S, V, bias=False).double()
        with torch.no_grad():
            self.head.weight.copy_(normal(V, D_S))
        self.h = normal(len(ours), D_S).requires_grad_()
        self.g = normal(len(theirs), D_T).float().double()
        # Shared tokens mean something alike to both, or no projection could keep the teacher's choice.
        self.teacher_weight = normal(vocab_size, D_T)
        with torch.no_grad():
            self.teacher_weight[:30] = 0.3 * self.teacher_weight[:30] + self.head.weight[:30] @ normal(D_S, D_T)
        self.student = StudentOutput(self.h, ours.labels, self.head, ids=ours, embedding=normal(V, D_S))
        self.teacher = TeacherOutput(
            Wide(self.g),
            FrozenHead(self.teacher_weight),
            None if same else torch.tensor(partner),
            theirs,
            normal(vocab_size, D_T),
            None if same else Map(),
            None if same else _spans(lengths, same_bytes),
        )

    @property
    def sizes(self) -> ModelSizes:
        return ModelSizes(D_S, D_T, self.head.weight.detach(), self.teacher_weight, self.teacher.vocabulary)

    @property
    def z(self) -> Tensor:
        return self.h @ self.head.weight.T

    @property
    def u(self) -> Tensor:
        return self.g @ self.teacher_weight.T

    @property
    def ids(self) -> tuple[TokenIds, TokenIds]:
        assert self.student.ids is not None and self.teacher.ids is not None
        return self.student.ids, self.teacher.ids

    @property
    def texts(self) -> Iterator[tuple[slice, slice]]:
        """Find the ranges of each text's tokens on both sides."""
        for bounds in zip(*(zip(side.offsets, side.offsets[1:], strict=False) for side in self.ids), strict=True):
            ours, theirs = (slice(int(begin), int(end)) for begin, end in bounds)
            yield ours, theirs

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Pairs of tokens with the same bytes."""
        if self.same:
            return [(i, i) for i in range(len(self.h))]
        return [(i, j) for i, j in enumerate(self.partner) if j >= 0]

    def extras(self, objective: Objective) -> nn.Module | None:
        """Make the trained modules of the objective, always the same, in evaluation mode."""
        torch.manual_seed(0)
        made = objective.extras(self.sizes)
        return None if made is None else made.double().eval()

    def loss(self, objective: Objective, extras: nn.Module | None, ce: float = 0.0, chunk: int = 4) -> Loss:
        modules = {} if extras is None else {objective.name: extras}
        both = [(1.0, objective), (ce, CrossEntropy())] if ce else [(1.0, objective)]
        return weighted_sum(both, self.student, self.teacher, modules, chunk=chunk)

    def alone(self, text: int) -> Case:
        """Select one text of the case."""
        one = Case(same=self.same, seed=self.seed)
        ours, theirs = list(self.texts)[text]
        mine, its = (
            TokenIds(side.inputs[at], side.labels[at], torch.tensor([0, at.stop - at.start]))
            for side, at in zip(self.ids, (ours, theirs), strict=True)
        )
        one.h, one.g = self.h.detach()[ours].requires_grad_(), self.g[theirs]
        one.student = replace(self.student, hidden=one.h, labels=mine.labels, ids=mine)
        partner, spans = self.teacher.partner, self.teacher.spans
        if partner is not None and spans is not None:
            partner = torch.where(partner >= 0, partner - theirs.start, -1)[ours]
            spans = (spans[0][ours], spans[1][theirs])
        one.teacher = replace(self.teacher, signal=Wide(one.g), partner=partner, ids=its, spans=spans)
        return one


def _spans(lengths: Sequence[Sequence[int]], same_bytes: bool) -> tuple[Tensor, Tensor]:
    """Make byte spans: both sides cover bytes 0 to 12 of each text in tokens of similar length, or all in every
    token."""
    if same_bytes:
        ours, theirs = (torch.tensor([0, 12]).expand(sum(side), 2) for side in lengths)
        return ours, theirs
    both = []
    for side in lengths:
        cuts = [torch.linspace(0, 12, n + 1).round().long() for n in side]
        both.append(torch.cat([torch.stack([cut[:-1], cut[1:]], 1) for cut in cuts]))
    return both[0], both[1]
