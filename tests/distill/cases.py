"""Two texts as two models see them, small and in float64, for every objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from raycloud.distill.objective import Ids, Objective, Sizes, StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives.cross_entropy import CrossEntropy
from raycloud.distill.signals import FrozenHead, Signal
from raycloud.link.codecs import CODECS
from raycloud.training.loop import Loss

V, W, D_S, D_T = 41, 53, 8, 12
OURS, THEIRS = (5, 7), (6, 4)
PARTNER = [0, -1, 2, 3, -1, 6, 7, -1, 8, -1, -1, 9]


@dataclass(frozen=True)
class Map:
    """Word i is the other's word i up to 30; the teacher's 30 to 39 mean the student's 30, others nothing."""

    @property
    def shared(self) -> tuple[Tensor, Tensor]:
        return torch.arange(30), torch.arange(30)

    @property
    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        mine = torch.cat([torch.arange(30), torch.full((10,), 30)])
        return mine, torch.arange(40), torch.ones(40)


class Wide(Signal):
    """A hidden signal whose rows stay as wide as they are."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__("key", "hidden", "float32", {"rows": CODECS["float32"].encode(rows.float())})
        object.__setattr__(self, "wide", rows)

    def rows(self, which: slice | Tensor = slice(None)) -> Tensor:
        return self.wide[which]  # type: ignore[attr-defined]


class Case:
    """Both models' words, rows, heads and tables; with ``same`` they have one tokenizer."""

    def __init__(self, *, same: bool = False) -> None:
        made = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=made).double()

        def ids(words: int, lengths: tuple[int, ...]) -> Ids:
            n = sum(lengths)
            offsets = torch.tensor([0, *lengths]).cumsum(0)
            return Ids(
                torch.randint(0, words, (n,), generator=made), torch.randint(0, words, (n,), generator=made), offsets
            )

        self.same, words = same, V if same else W
        ours, theirs = ids(V, OURS), ids(words, OURS if same else THEIRS)
        self.head = nn.Linear(D_S, V, bias=False).double()
        with torch.no_grad():
            self.head.weight.copy_(normal(V, D_S))
        self.h = normal(len(ours), D_S).requires_grad_()
        self.g = normal(len(theirs), D_T).float().double()
        # Shared words mean something alike to both, or no projection could keep the teacher's choice.
        self.teacher_weight = normal(words, D_T)
        with torch.no_grad():
            self.teacher_weight[:30] = 0.3 * self.teacher_weight[:30] + self.head.weight[:30] @ normal(D_S, D_T)
        self.student = StudentOutput(self.h, ours.labels, self.head, ids=ours, embedding=normal(V, D_S))
        self.teacher = TeacherOutput(
            Wide(self.g),
            FrozenHead(self.teacher_weight),
            None if same else torch.tensor(PARTNER),
            theirs,
            normal(words, D_T),
            None if same else Map(),
            None if same else _spans(),
        )

    @property
    def sizes(self) -> Sizes:
        return Sizes(D_S, D_T, self.head.weight.detach(), self.teacher_weight, self.teacher.words)

    @property
    def z(self) -> Tensor:
        return self.h @ self.head.weight.T

    @property
    def u(self) -> Tensor:
        return self.g @ self.teacher_weight.T

    @property
    def ids(self) -> tuple[Ids, Ids]:
        assert self.student.ids is not None and self.teacher.ids is not None
        return self.student.ids, self.teacher.ids

    @property
    def texts(self) -> Iterator[tuple[slice, slice]]:
        """Where each text is among both sides' tokens."""
        for bounds in zip(*(zip(side.offsets, side.offsets[1:], strict=False) for side in self.ids), strict=True):
            ours, theirs = (slice(int(begin), int(end)) for begin, end in bounds)
            yield ours, theirs

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Tokens of the same bytes."""
        if self.same:
            return [(i, i) for i in range(len(self.h))]
        return [(i, j) for i, j in enumerate(PARTNER) if j >= 0]

    def extras(self, objective: Objective) -> nn.Module | None:
        """What the objective trains, always the same, and its running means at rest."""
        torch.manual_seed(0)
        made = objective.extras(self.sizes)
        return None if made is None else made.double().eval()

    def loss(self, objective: Objective, extras: nn.Module | None, ce: float = 0.0, chunk: int = 4) -> Loss:
        modules = {} if extras is None else {objective.name: extras}
        both = [(1.0, objective), (ce, CrossEntropy())] if ce else [(1.0, objective)]
        return weighted_sum(both, self.student, self.teacher, modules, chunk=chunk)

    def alone(self, text: int) -> Case:
        """One of its texts and no other."""
        one = Case(same=self.same)
        ours, theirs = list(self.texts)[text]
        mine, its = (
            Ids(side.inputs[at], side.labels[at], torch.tensor([0, at.stop - at.start]))
            for side, at in zip(self.ids, (ours, theirs), strict=True)
        )
        one.h, one.g = self.h.detach()[ours].requires_grad_(), self.g[theirs]
        one.student = replace(self.student, rows=one.h, labels=mine.labels, ids=mine)
        partner, spans = self.teacher.partner, self.teacher.spans
        if partner is not None and spans is not None:
            partner = torch.where(partner >= 0, partner - theirs.start, -1)[ours]
            spans = (spans[0][ours], spans[1][theirs])
        one.teacher = replace(self.teacher, signal=Wide(one.g), partner=partner, ids=its, spans=spans)
        return one


def _spans() -> tuple[Tensor, Tensor]:
    """Both sides cover bytes 0 to 12 of each text, in tokens of about the same length."""
    both = []
    for lengths in (OURS, THEIRS):
        cuts = [torch.linspace(0, 12, n + 1).round().long() for n in lengths]
        both.append(torch.cat([torch.stack([cut[:-1], cut[1:]], 1) for cut in cuts]))
    return both[0], both[1]
