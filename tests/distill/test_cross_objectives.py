"""Objectives between two tokenizers and two spaces, against plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from raycloud.data.batches import Batch
from raycloud.distill.multi_level import multi_level, sequence_ranking
from raycloud.distill.objective import Ids, Objective, Sizes, StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives.cross_entropy import CrossEntropy
from raycloud.distill.objectives.dskd import DSKD, fitted
from raycloud.distill.objectives.dskd_cma import DSKDCMA
from raycloud.distill.objectives.mcw_kd import MCWKD, Extras
from raycloud.distill.objectives.mined import MinED
from raycloud.distill.objectives.multi_level_ot import MultiLevelOT
from raycloud.distill.objectives.uld import ULD
from raycloud.distill.signals import FrozenHead, Signal, SignalRecipe, frozen_head, observe
from raycloud.distill.transport import relative_epsilon, sinkhorn
from raycloud.link.codecs import CODECS
from raycloud.models.segments import Segment
from raycloud.training.loop import Loss
from tests.models.families import tiny

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


EVERY: list[Callable[[], Objective]] = [
    ULD,
    lambda: ULD(k=8),
    MinED,
    lambda: DSKD(version=1),
    DSKD,
    DSKDCMA,
    lambda: MultiLevelOT(words=9, keep=7),
    lambda: MCWKD(words=9),
    lambda: MCWKD(words=9, solver="semi_dual"),
]


@pytest.mark.parametrize("make", EVERY)
def test_a_text_says_the_same_in_any_company(make: Callable[[], Objective]) -> None:
    """The sum over two texts is the sum over each alone: no padding and no neighbour has a part in it."""
    case, objective = Case(), make()
    torch.manual_seed(0)
    extras = objective.extras(case.sizes)
    extras = None if extras is None else extras.double().eval()
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
        modules = {} if extras is None else {objective.name: extras}
        loss = weighted_sum([(1.0, objective), (0.5, CrossEntropy())], student, teacher, modules)
        loss.sum.backward()
        assert torch.isfinite(loss.sum)
        assert rows.grad is not None and torch.isfinite(rows.grad).all()


def test_cross_entropy_beside_it_counts_every_token() -> None:
    case = Case()
    loss = case.loss(ULD(), None, ce=1.0)
    entropy = nn.functional.cross_entropy(case.z, case.student.labels, reduction="sum")
    assert float(loss.terms["cross_entropy"]) == pytest.approx(float(entropy.detach()), rel=1e-9)


def per_text(case: Case, values: Tensor, side: Ids) -> list[Tensor]:
    return [values[int(side.offsets[text]) : int(side.offsets[text + 1])] for text in range(2)]


def ranks(logits: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    top = (logits / tau).softmax(-1).topk(k)
    return top.values, top.indices


def test_multi_level_ot_is_the_sum_of_its_levels_text_by_text() -> None:
    case, objective = Case(), MultiLevelOT(words=9, keep=7, temperature=1.5)
    ours = case.loss(objective, None)
    ids, other = case.student.ids, case.teacher.ids
    assert ids is not None and other is not None
    reference = case.h.new_zeros(())
    for text, (z, u) in enumerate(zip(per_text(case, case.z, ids), per_text(case, case.u, other), strict=True)):
        everywhere = [torch.ones(1, len(one), dtype=torch.bool) for one in (z, u)]
        ordered = []
        for one, mask in zip((z, u), everywhere, strict=True):
            values, which = ranks(one, 9, 1.5)
            ordered.append(sequence_ranking(values[None], which[None], mask, 7))
        partner = torch.tensor(PARTNER[int(ids.offsets[text]) : int(ids.offsets[text + 1])])
        partner = torch.where(partner >= 0, partner - other.offsets[text], -1)
        levels = multi_level(ordered[1].detach(), ordered[0], everywhere[1], everywhere[0], partner[None])
        reference = reference + (levels.absolute + 0.1 * levels.logarithmic + 0.1 * levels.transport).sum()
    assert float(ours.sum.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)
    inputs = [case.h, case.head.weight]
    for a, b in zip(torch.autograd.grad(ours.sum, inputs), torch.autograd.grad(reference, inputs), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def spans(case: Case) -> tuple[Tensor, Tensor]:
    """Both sides cover bytes 0 to 12 of each text, in tokens of about the same length."""
    both = []
    for lengths in (OURS, THEIRS):
        cuts = [torch.linspace(0, 12, n + 1).round().long() for n in lengths]
        both.append(torch.cat([torch.stack([cut[:-1], cut[1:]], 1) for cut in cuts]))
    return both[0], both[1]


def test_mcw_kd_adds_two_transports_to_cross_model_attention() -> None:
    case, objective = Case(), MCWKD(words=9)
    case.teacher = replace(case.teacher, spans=spans(case))
    torch.manual_seed(0)
    extras = objective.extras(case.sizes).double()
    assert isinstance(extras, Extras)
    ours = case.loss(objective, extras.eval())
    attention = case.loss(DSKDCMA(temperature=3.0), extras)
    ids, other = case.student.ids, case.teacher.ids
    assert ids is not None and other is not None
    reference = attention.sum
    g = extras.ot(case.g)
    sides = [per_text(case, one, ids) for one in (case.z, case.h, spans(case)[0])]
    others = [per_text(case, one, other) for one in (case.u, g, spans(case)[1])]
    for z, h, span, u, state, its_span in zip(*sides, *others, strict=True):
        q, p = ranks(z, 9, 2.0)[0], ranks(u, 9, 2.0)[0]
        a, b = extras.salience(state).sigmoid(), extras.salience(h).sigmoid()
        kl_rows = [[((x + 1e-7) * ((x + 1e-7) / (y + 1e-7)).log() - x + y).sum() for y in q] for x in p]
        predicted = [torch.cdist(p, q), torch.stack([torch.stack(row) for row in kl_rows]), (a - b.T).abs()]
        mine, its = (torch.stack([one[max(0, i - 4) : i + 5].mean(0) for i in range(len(one))]) for one in (h, state))
        overlap = torch.tensor(
            [
                [max(0, min(x[1], y[1]) - max(x[0], y[0])) / (max(x[1], y[1]) - min(x[0], y[0])) for y in span.tolist()]
                for x in its_span.tolist()
            ]
        )
        cosine = nn.functional.cosine_similarity(its[:, None], mine[None], dim=-1)
        stands = [1 - overlap, torch.cdist(its, mine), 1 - cosine]
        for costs, weights in ((predicted, (0.2, 0.5, 0.3)), (stands, (0.3, 0.5, 0.2))):
            cost = sum(weight * one for weight, one in zip(weights, costs, strict=True))
            assert isinstance(cost, Tensor)
            mu, nu = (torch.full((1, n), 1 / n) for n in cost.shape)
            detached = cost.detach().float()[None]
            plan = sinkhorn(detached, mu, nu, relative_epsilon(detached, mu, nu, 0.1), 30).mass[0]
            reference = reference + (plan * cost).sum() * cost.shape[1]
    assert float(ours.sum.detach()) == pytest.approx(float(reference.detach()), rel=1e-4)
    inputs = [case.h, case.head.weight, extras.ot.weight, extras.salience.weight]
    for x, y in zip(torch.autograd.grad(ours.sum, inputs), torch.autograd.grad(reference, inputs), strict=True):
        assert (x - y).norm() <= 1e-3 * y.norm()


def test_cost_weights_learn_and_costs_are_weighed_by_what_they_were() -> None:
    case, objective = Case(), MCWKD(words=9)
    case.teacher = replace(case.teacher, spans=spans(case))
    torch.manual_seed(0)
    extras = objective.extras(case.sizes).double().train()
    assert isinstance(extras, Extras)
    torch.testing.assert_close(extras.logit_costs.weights, torch.tensor([0.2, 0.5, 0.3]).double())
    loss = case.loss(objective, extras)
    (gradient,) = torch.autograd.grad(loss.sum, extras.state_costs.logits)
    assert gradient.abs().min() > 0
    assert not torch.equal(extras.state_costs.scale, torch.ones(3).double())
    again = case.loss(objective, extras.eval())
    assert float(again.sum.detach()) != pytest.approx(float(loss.sum.detach()), rel=1e-3)


def test_the_semi_dual_potential_climbs_to_the_transport_it_bounds() -> None:
    case, objective = Case(), MCWKD(words=9, solver="semi_dual")
    case.teacher = replace(case.teacher, spans=spans(case))
    torch.manual_seed(0)
    extras = objective.extras(case.sizes).double().eval()
    assert isinstance(extras, Extras)
    potentials = [*extras.logit_potential.parameters(), *extras.state_potential.parameters()]
    optimiser = torch.optim.Adam(potentials, lr=3e-3)
    bounds = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = case.loss(objective, extras)
        loss.sum.backward()
        optimiser.step()
        bounds.append(float(loss.terms["mcw_kd/logit_transport"]) + float(loss.terms["mcw_kd/state_transport"]))
    assert bounds[-1] > bounds[0]


@pytest.mark.parametrize("kind", ["topk", "sorted"])
def test_uld_takes_what_a_small_signal_tells(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = tiny("llama", dtype=torch.float32)
    segment = Segment(model)
    ids = torch.randint(3, 50, (2, 12))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.roll(ids, -1, 1))
    student = StudentOutput.of(Segment(tiny("llama", dtype=torch.float32, seed=1)), batch)
    head = frozen_head(segment, "float32")
    losses = [
        weighted_sum([(1.0, ULD(k=6))], student, TeacherOutput(observe(segment, "t", batch, recipe, [1.0]), head)).sum
        for recipe in (SignalRecipe(codec="float32"), SignalRecipe(kind=kind, codec="float32", k=8))  # type: ignore[arg-type]
    ]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-4)
    few = TeacherOutput(observe(segment, "t", batch, SignalRecipe(kind=kind, k=4), [1.0]), head)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k=6 needs as many from the signal, got 4"):
        weighted_sum([(1.0, ULD(k=6))], student, few)
