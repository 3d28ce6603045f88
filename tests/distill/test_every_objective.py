"""Properties that every objective must have, ours and published: one table, one test per property."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from raycloud.data.batches import IGNORE, Batch
from raycloud.distill.objective import (
    ModelSizes,
    Objective,
    StudentOutput,
    TeacherOutput,
    token_embedding,
    weighted_sum,
)
from raycloud.distill.objectives import OBJECTIVES, CrossEntropy
from raycloud.distill.objectives.dskd import DSKD
from raycloud.distill.objectives.dskd_cma import DSKDCMA
from raycloud.distill.objectives.js_divergence import JSDivergence
from raycloud.distill.objectives.mcw_kd import MCWKD
from raycloud.distill.objectives.mined import MinED
from raycloud.distill.objectives.multi_level_ot import MultiLevelOT
from raycloud.distill.objectives.uld import ULD
from raycloud.distill.signals import FrozenHead, SignalRecipe, compute_signal, frozen_head
from raycloud.models.segments import Segment
from tests.distill import formulas
from tests.distill.cases import D_S, D_T, Case, Map, V, Wide
from tests.models.families import tiny


@dataclass(frozen=True)
class Row:
    """Objective with options, its formula, and the tokenizers for which it is defined."""

    make: Callable[[], Objective]
    formula: formulas.Formula
    same: tuple[bool, ...] = (False,)
    exact: float = 1e-9
    """Relative tolerance of value and gradients."""
    alone: bool = True
    """The loss of a text does not depend on the other texts of the batch."""
    half: float = 0.1
    """Relative tolerance of the gradient of the hidden states in bfloat16."""


def _plain(name: str, between: Callable[[Tensor, Tensor], Tensor], **options: float) -> Row:
    return Row(lambda: OBJECTIVES[name](temperature=1.5, **options), formulas.divergence(between), (True,), 1e-7)


kl = formulas.kl
ROWS: dict[str, Row] = {
    "forward_kl": _plain("forward_kl", kl),
    "reverse_kl": _plain("reverse_kl", lambda p, q: kl(q, p)),
    "js_divergence": _plain("js_divergence", lambda p, q: formulas.mixture(p, q, 0.5)),
    "js_divergence beta=0.3": _plain("js_divergence", lambda p, q: formulas.mixture(p, q, 0.3), beta=0.3),
    "js_divergence beta=0": _plain("js_divergence", kl, beta=0.0),
    "js_divergence beta=1": _plain("js_divergence", lambda p, q: kl(q, p), beta=1.0),
    "skewed_forward_kl": _plain("skewed_forward_kl", lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skewed_reverse_kl": _plain("skewed_reverse_kl", lambda p, q: kl(q, 0.9 * p + 0.1 * q)),
    "adaptive_kl": _plain("adaptive_kl", formulas.adaptive),
    "adaptive_kl mass=0.7": _plain("adaptive_kl", lambda p, q: formulas.adaptive(p, q, 0.7), head_mass=0.7),
    # The gradient of |p - q| is a sign, which rounding turns where the two are near.
    "uld": Row(ULD, formulas.uld, (False, True), half=0.2),
    "uld k=8": Row(lambda: ULD(k=8), formulas.uld, half=0.2),
    "uld k=None": Row(lambda: ULD(k=None), formulas.uld, (False, True), half=0.2),
    "uld published": Row(lambda: ULD(compat="published"), formulas.uld, (False, True), half=0.2),
    "mined": Row(MinED, formulas.mined),
    "mined k=5": Row(lambda: MinED(k=5), formulas.mined),
    "mined published": Row(lambda: MinED(compat="published"), formulas.mined_published),
    "dskd version=1": Row(lambda: DSKD(version=1), formulas.dskd, (False, True)),
    # The fitted way to the teacher's space is kept in float32.
    "dskd": Row(DSKD, formulas.dskd, (False, True), 1e-5, alone=False),
    "dskd ours": Row(lambda: DSKD(compat="ours"), formulas.dskd, (False, True), 1e-5),
    "dskd_cma": Row(lambda: DSKDCMA(teacher_temperature=1.5), formulas.dskd_cma),
    "dskd_cma prior": Row(lambda: DSKDCMA(prior=0.5), formulas.dskd_cma, exact=1e-6),
    "dskd_cma published": Row(lambda: DSKDCMA(compat="published"), formulas.dskd_cma, alone=False),
    "multi_level_ot": Row(lambda: MultiLevelOT(k=9, keep=7, temperature=1.5), formulas.multi_level_ot),
    "multi_level_ot official": Row(
        lambda: MultiLevelOT(compat="official", keep=7), formulas.multi_level_ot_published, alone=False
    ),
    "multi_level_ot mcwkd": Row(
        lambda: MultiLevelOT(compat="mcwkd", keep=7), formulas.multi_level_ot_published, alone=False
    ),
    # Byte costs are float32.
    "mcw_kd": Row(lambda: MCWKD(k=9), formulas.mcw_kd, exact=1e-6),
    "mcw_kd semi_dual": Row(lambda: MCWKD(k=9, solver="semi_dual"), formulas.mcw_kd, exact=1e-5),
    "mcw_kd information": Row(lambda: MCWKD(k=9, importance="information"), formulas.mcw_kd, exact=1e-6),
    "mcw_kd fixed": Row(lambda: MCWKD(k=9, weighting="fixed"), formulas.mcw_kd, exact=1e-6),
    "mcw_kd published": Row(
        lambda: MCWKD(k=9, compat="published", weighting="projected"), formulas.mcw_kd, exact=1e-6, alone=False
    ),
}
EVERY = [pytest.param(row, same, id=f"{name}{' same' * same}") for name, row in ROWS.items() for same in row.same]
every = pytest.mark.parametrize(("row", "same"), EVERY)


def test_the_table_has_every_objective() -> None:
    assert {row.make().name for row in ROWS.values()} == set(OBJECTIVES)


def found(loss: Tensor, case: Case, extras: nn.Module | None) -> list[Tensor]:
    """Compute the loss and its gradients."""
    inputs = [case.h, case.head.weight, *(() if extras is None else extras.parameters())]
    given = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, given, strict=True))]


def near(ours: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-6)


@every
def test_value_and_gradient_equal_the_formula(row: Row, same: bool) -> None:
    case, objective = Case(same=same), row.make()
    extras = case.extras(objective)
    loss = case.loss(objective, extras)
    assert loss.count == len(case.h)
    near(found(loss.sum, case, extras), found(row.formula(case, objective, extras), case, extras), row.exact)


@every
def test_a_text_says_the_same_in_any_company_unless_published_otherwise(row: Row, same: bool) -> None:
    """The sum over two texts equals the sum over each alone: chunks, padding and other texts have no effect."""
    case, objective = Case(same=same), row.make()
    extras = case.extras(objective)
    whole = found(case.loss(objective, extras, chunk=100).sum, case, extras)
    parts = []
    for text in range(2):
        one = case.alone(text)
        one.head = case.head
        parts.append(found(one.loss(objective, extras, chunk=3).sum, one, extras))
    both = [parts[0][0] + parts[1][0], torch.cat([part[1] for part in parts])]
    if row.alone:
        near(whole[:2], both, 1e-6)
    else:
        assert abs(float(both[0] / whole[0]) - 1) > 1e-4


@cache
def _models() -> tuple[Segment, Segment]:
    return Segment(tiny("llama").float()), Segment(tiny("llama", seed=1).float())


def _padded(more: int) -> tuple[StudentOutput, TeacherOutput]:
    """Two texts with a number of padding columns after the longer one."""
    student, teacher = _models()
    made = torch.Generator().manual_seed(2)
    ids = torch.zeros(2, 9 + more, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for text, length in enumerate((9, 7)):
        ids[text, :length] = torch.randint(3, 97, (length,), generator=made)
        labels[text, 2 : length - 1] = ids[text, 3:length]
    batch = Batch(ids, (torch.arange(9 + more) < torch.tensor([9, 7])[:, None]), labels)
    output = StudentOutput.of(student, batch)
    signal, head = (
        compute_signal(teacher, "t", batch, SignalRecipe(codec="float32"), [1.0]),
        frozen_head(teacher, "float32"),
    )
    return output, TeacherOutput(signal, head, ids=output.ids, embedding=token_embedding(teacher), vocabulary=Map())


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_columns_of_padding_change_nothing(row: Row) -> None:
    losses = []
    for more in (0, 5):
        student, teacher = _padded(more)
        objective = row.make()
        torch.manual_seed(0)
        extras = objective.extras(ModelSizes(32, 32, student.head.weight.detach(), teacher.frozen_head.weight, None))
        modules = {} if extras is None else {objective.name: extras.eval()}
        loss = weighted_sum([(1.0, objective)], student, teacher, modules)
        losses.append([loss.sum.detach(), torch.autograd.grad(loss.sum, student.hidden)[0]])
    near(losses[1], losses[0], 1e-4)


def _narrow(
    case: Case, objective: Objective, dtype: torch.dtype, scales: tuple[float, float] = (1.0, 1.0)
) -> tuple[StudentOutput, TeacherOutput, dict[str, nn.Module]]:
    """Convert a case as in training: the teacher's numbers and the trained modules in float32, the student's in a
    given dtype."""
    hidden = (case.h.detach() * scales[0]).bfloat16().to(dtype).requires_grad_()
    head = nn.Linear(D_S, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(case.head.weight.bfloat16())
    student = replace(case.student, hidden=hidden, head=head, embedding=case.student.embedding.float())  # type: ignore[union-attr]
    weight = case.teacher_weight.float() * scales[1]
    teacher = replace(
        case.teacher,
        head=FrozenHead(weight),
        signal=Wide(case.g.float()),
        embedding=case.teacher.embedding.float(),  # type: ignore[union-attr]
    )
    torch.manual_seed(0)
    extras = objective.extras(ModelSizes(D_S, D_T, head.weight.float(), weight, case.teacher.vocabulary))
    return student, teacher, {} if extras is None else {objective.name: extras.eval()}


@every
def test_half_precision_is_near(row: Row, same: bool) -> None:
    """bfloat16 has 8 bits: the loss is within 2 % of float32, and gradients within the row's tolerance."""
    case, objective, both = Case(same=same), row.make(), []
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, extras = _narrow(case, objective, dtype)
        loss = weighted_sum([(1.0, objective)], student, teacher, extras)
        assert loss.sum.dtype == torch.float32
        both.append([loss.sum.detach(), torch.autograd.grad(loss.sum, student.hidden)[0].float()])
    near(both[1][:1], both[0][:1], 0.02)
    near(both[1][1:], both[0][1:], row.half)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_the_extremes(row: Row, same: bool, dtype: torch.dtype) -> None:
    """Make extreme cases: both uniform, one of them one-hot, and both, with logits beyond ±1e4."""
    objective = row.make()
    for scales in product((0.0, 1e4), repeat=2):
        student, teacher, extras = _narrow(Case(same=same), objective, dtype, scales)
        trained = [parameter for module in extras.values() for parameter in module.parameters()]
        loss = weighted_sum([(1.0, objective), (0.5, CrossEntropy())], student, teacher, extras)
        loss.sum.backward()
        assert math.isfinite(float(loss.sum.detach()))
        given = [one.grad for one in (student.hidden, student.head.weight, *trained) if one.grad is not None]
        assert all(torch.isfinite(one).all() for one in given)


def test_the_published_options_are_not_those_that_are_taken_unasked() -> None:
    assert {one().compat for one in (ULD, MinED, DSKDCMA, MultiLevelOT, MCWKD)} == {"ours"}
    assert DSKD().compat == "published"  # ours was measured to be further from the teacher
    assert JSDivergence().beta == 0.5 and DSKD().version == 2
    assert ULD(compat="published").needs.signals == ULD(k=None).needs.signals == ("hidden", "logits")
    assert "topk" in ULD().needs.signals
