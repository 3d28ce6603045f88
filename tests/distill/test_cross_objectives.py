"""Objectives between two tokenizers and two spaces, against plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from raycloud.distill.objective import Ids, Objective, Sizes, StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives.cross_entropy import CrossEntropy
from raycloud.distill.objectives.dskd import DSKD, fitted
from raycloud.distill.objectives.dskd_cma import DSKDCMA
from raycloud.distill.objectives.mined import MinED
from raycloud.distill.objectives.uld import ULD
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


class Case:
    """Two texts as both models see them, in float64."""

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

        ours, theirs = ids(V, OURS), ids(V if same else W, OURS if same else THEIRS)
        words = V if same else W
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
            Signal("key", "hidden", "float32", {"rows": CODECS["float32"].encode(self.g)}),
            FrozenHead(self.teacher_weight),
            None if same else torch.tensor(PARTNER),
            theirs,
            normal(words, D_T),
            None if same else Map(),
        )
        # The codec's numbers are float32; the head of a float64 reference wants them wide.
        self.teacher = replace(self.teacher, signal=Wide(self.teacher.signal, self.g))
        self.sizes = Sizes(D_S, D_T, self.head.weight, self.teacher_weight, self.teacher.words)

    def loss(self, objective: Objective, extras: nn.Module | None, ce: float = 0.0, chunk: int = 4) -> Loss:
        modules = {} if extras is None else {objective.name: extras}
        both = [(1.0, objective), (ce, CrossEntropy())] if ce else [(1.0, objective)]
        return weighted_sum(both, self.student, self.teacher, modules, chunk=chunk)

    @property
    def z(self) -> Tensor:
        return self.h @ self.head.weight.T

    @property
    def u(self) -> Tensor:
        return self.g @ self.teacher_weight.T


class Wide(Signal):
    """A hidden signal whose rows stay float64."""

    def __init__(self, signal: Signal, rows: Tensor) -> None:
        super().__init__(signal.key, signal.kind, signal.codec, signal.payload)
        object.__setattr__(self, "wide", rows)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TeacherOutput, "rows", lambda self, which=slice(None): self.signal.wide[which])


def agree(ours: Tensor, reference: Tensor, inputs: list[Tensor]) -> None:
    assert float(ours.detach()) == pytest.approx(float(reference.detach()), rel=1e-9)
    got = torch.autograd.grad(ours, inputs, allow_unused=True)
    wanted = torch.autograd.grad(reference, inputs, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def kl(u: Tensor, z: Tensor, tau: float) -> Tensor:
    p = (u / tau).softmax(-1)
    return (p * (p.log() - (z / tau).log_softmax(-1))).sum()


PAIRS = [(i, j) for i, j in enumerate(PARTNER) if j >= 0]


def test_uld_is_the_distance_of_sorted_probabilities_at_pairs() -> None:
    case = Case()
    ours = case.loss(ULD(k=None), None)
    reference = case.h.new_zeros(())
    for i, j in PAIRS:
        q = torch.cat([case.z[i].softmax(-1), torch.zeros(W - V).double()]).sort(descending=True).values
        reference = reference + (q - case.u[j].softmax(-1).sort(descending=True).values).abs().sum()
    agree(ours.sum, reference, [case.h, case.head.weight])
    assert ours.count == sum(OURS)


def test_uld_of_the_largest_errs_by_at_most_the_rests() -> None:
    case = Case()
    whole, short = (float(case.loss(ULD(k=k), None).sum.detach()) for k in (None, 20))
    rest = sum(
        float(1 - one[index].softmax(-1).topk(20).values.sum().detach())
        for i, j in PAIRS
        for one, index in ((case.z, i), (case.u, j))
    )
    assert short <= whole <= short + rest and whole - short > 1e-6


@pytest.mark.parametrize("k", [None, 5])
def test_mined_is_forward_kl_of_what_the_student_can_name(k: int | None) -> None:
    case = Case()
    ours = case.loss(MinED(temperature=2.0, k=k), None)
    reference = case.h.new_zeros(())
    for i, j in PAIRS:
        p = (case.u[j] / 2).softmax(-1)
        if k:
            p = p * (p >= p.sort(descending=True).values[k - 1])
        named = torch.cat([p[:30], p[30:40].sum()[None]])
        named = named / named.sum()
        log_q = (case.z[i, :31] / 2).log_softmax(-1)
        reference = reference + sum((a * (a.log() - b) for a, b in zip(named, log_q, strict=True) if a > 0), start=0)
    agree(ours.sum, reference, [case.h, case.head.weight])


def test_mined_teaches_nothing_about_words_the_teacher_cannot_say() -> None:
    case = Case()
    (gradient,) = torch.autograd.grad(case.loss(MinED(), None).sum, case.head.weight)
    assert gradient[:31].abs().sum() > 0
    assert gradient[31:].abs().max() == 0


@pytest.mark.parametrize("same", [True, False])
def test_dskd_version_1_is_its_formula(same: bool) -> None:
    case = Case(same=same)
    objective = DSKD(version=1, temperature=2.0)
    torch.manual_seed(0)
    extras = objective.extras(case.sizes).double()
    ours = case.loss(objective, extras)
    pairs = [(i, i) for i in range(len(case.h))] if same else PAIRS
    i, j = (torch.tensor(side) for side in zip(*pairs, strict=True))
    aim = extras.t2s(case.g[j]) @ case.head.weight.detach().T
    entropy = nn.functional.cross_entropy(aim, case.student.labels[i], reduction="sum")
    back = extras.s2t(case.h[i]) @ case.teacher_weight.T
    reference = kl(aim.detach(), case.z[i], 2.0) + entropy + kl(case.u[j], back, 2.0)
    agree(ours.sum, reference, [case.h, case.head.weight, *extras.parameters()])


@pytest.mark.parametrize("same", [True, False])
def test_dskd_version_2_is_its_formula(same: bool) -> None:
    case = Case(same=same)
    objective = DSKD(temperature=2.0)
    extras = objective.extras(case.sizes).double()
    ours = case.loss(objective, extras)
    pairs = [(i, i) for i in range(len(case.h))] if same else PAIRS
    i, j = (torch.tensor(side) for side in zip(*pairs, strict=True))
    shared = V if same else 30
    near, far = case.head.weight.detach()[:shared], case.teacher_weight[:shared]
    s2t = near.T @ torch.linalg.pinv(far.T)
    best = case.u[j].argmax(-1)
    known = best < shared
    aim = extras.t2s(case.g[j]) @ case.head.weight.detach().T
    entropy = nn.functional.cross_entropy(aim[known], best[known], reduction="sum")
    right = known & (aim.argmax(-1) == best)
    assert int(right.sum()) > 0
    reference = kl(aim.detach()[right], case.z[i][right], 2.0) + entropy
    reference = reference + kl(case.u[j], case.h[i] @ s2t @ case.teacher_weight.T, 2.0)
    assert float(ours.sum.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    inputs = [case.h, case.head.weight, *extras.parameters()]
    got, wanted = torch.autograd.grad(ours.sum, inputs), torch.autograd.grad(reference, inputs)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_fitted_projectors_keep_the_logits_where_the_spaces_allow() -> None:
    """A teacher whose head is the student's in another basis: projected rows give the teacher's own logits."""
    torch.manual_seed(0)
    head, basis = torch.randn(50, 8).double(), torch.linalg.qr(torch.randn(12, 8).double()).Q
    teacher = head @ basis.T
    g = torch.randn(20, 12).double()
    torch.testing.assert_close(g @ fitted(teacher, head) @ head.T, g @ teacher.T)
    wide = torch.randn(50, 12).double()
    way = torch.linalg.lstsq(head, wide).solution
    torch.testing.assert_close(fitted(wide, head), way.T)


def test_cross_model_attention_is_its_formula() -> None:
    case = Case()
    objective = DSKDCMA(temperature=2.0, teacher_temperature=1.5)
    torch.manual_seed(0)
    extras = objective.extras(case.sizes).double()
    ours = case.loss(objective, extras)

    def unit(x: Tensor) -> Tensor:
        return x / (x**2).mean(-1, keepdim=True).sqrt()

    ids, other = case.student.ids, case.teacher.ids
    assert ids is not None and other is not None
    e_s, e_t = case.student.embedding, case.teacher.embedding
    assert e_s is not None and e_t is not None
    reference = case.h.new_zeros(())
    for text in range(2):
        a, b = (slice(int(side.offsets[text]), int(side.offsets[text + 1])) for side in (ids, other))
        q = extras.query(torch.cat([e_s[ids.inputs[a]], e_s[ids.labels[a]]], -1))
        k = unit(torch.cat([e_t[other.inputs[b]], e_t[other.labels[b]]], -1))
        scores = (q @ k.T / (2 * D_T) ** 0.5).float()
        values = extras.t2s(unit(case.g[b]) + unit(e_t[other.labels[b]]))
        aim = (scores.softmax(-1).double() @ values) @ case.head.weight.detach().T
        back = (scores.T.softmax(-1).double() @ extras.s2t(case.h[a])) @ case.teacher_weight.T
        y = ids.labels[a]
        right = aim.argmax(-1) == y
        reference = reference + nn.functional.cross_entropy(aim, y, reduction="sum") + kl(case.u[b], back, 2.0)
        p = (aim.detach()[right] / 3.0).softmax(-1)
        reference = reference + (p * (p.log() - (case.z[a][right] / 2.0).log_softmax(-1))).sum()
    assert float(ours.sum.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    inputs = [case.h, *extras.parameters()]
    got, wanted = torch.autograd.grad(ours.sum, inputs), torch.autograd.grad(reference, inputs)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * max(1e-6, float(b.norm()))


EVERY: list[Callable[[], Objective]] = [ULD, lambda: ULD(k=8), MinED, lambda: DSKD(version=1), DSKD, DSKDCMA]


@pytest.mark.parametrize("make", EVERY)
def test_a_text_says_the_same_in_any_company(make: Callable[[], Objective]) -> None:
    """The sum over two texts is the sum over each alone: no padding and no neighbour has a part in it."""
    case, objective = Case(), make()
    torch.manual_seed(0)
    extras = objective.extras(case.sizes)
    extras = None if extras is None else extras.double()
    whole = float(case.loss(objective, extras, chunk=100).sum.detach())
    parts = 0.0
    for text in range(2):
        one = Case()
        ids, other = case.student.ids, case.teacher.ids
        assert ids is not None and other is not None
        a, b = (slice(int(side.offsets[text]), int(side.offsets[text + 1])) for side in (ids, other))

        def cut(side: Ids, at: slice) -> Ids:
            return Ids(side.inputs[at], side.labels[at], torch.tensor([0, at.stop - at.start]))

        partner = torch.tensor(PARTNER[a]) - torch.where(torch.tensor(PARTNER[a]) >= 0, b.start, 0)
        one.h = case.h[a].detach().requires_grad_()
        one.student = replace(case.student, rows=one.h, labels=case.student.labels[a], ids=cut(ids, a))
        one.teacher = replace(
            case.teacher, partner=partner, ids=cut(other, b), signal=Wide(case.teacher.signal, case.g[b])
        )
        parts += float(one.loss(objective, extras).sum.detach())
    assert parts == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", EVERY)
def test_finite_at_the_extremes(make: Callable[[], Objective], dtype: torch.dtype) -> None:
    objective = make()
    for scale in (0.0, 1e4):
        case = Case()
        rows = (case.h.detach() * scale).to(dtype).requires_grad_()
        head = nn.Linear(D_S, V, bias=False).to(dtype)
        student = replace(case.student, rows=rows, head=head)
        teacher = replace(
            case.teacher,
            head=FrozenHead(case.teacher_weight.float() * scale),
            signal=Wide(case.teacher.signal, case.g.float()),
        )
        extras = objective.extras(Sizes(D_S, D_T, head.weight.float(), case.teacher_weight.float(), case.teacher.words))
        modules = {} if extras is None else {objective.name: extras.to(dtype)}
        loss = weighted_sum([(1.0, objective), (0.5, CrossEntropy())], student, teacher, modules)
        loss.sum.backward()
        assert torch.isfinite(loss.sum)
        assert rows.grad is not None and torch.isfinite(rows.grad).all()


def test_cross_entropy_beside_it_counts_every_token() -> None:
    case = Case()
    loss = case.loss(ULD(), None, ce=1.0)
    entropy = nn.functional.cross_entropy(case.z, case.student.labels, reduction="sum")
    assert float(loss.terms["cross_entropy"]) == pytest.approx(float(entropy.detach()), rel=1e-9)
