"""Properties of objectives between two tokenizers and two hidden spaces; see test_every_objective for the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raycloud.data.batches import Batch
from raycloud.distill.objective import StudentOutput, TeacherOutput, TokenIds, same_position, weighted_sum
from raycloud.distill.objectives.dskd import fitted
from raycloud.distill.objectives.dskd_cma import DSKDCMA, attention
from raycloud.distill.objectives.mcw_kd import MCWKD, FixedCostWeights, MCWKDExtras, ProjectedCostWeights
from raycloud.distill.objectives.mined import MinED, first_mapped_logits
from raycloud.distill.objectives.uld import ULD
from raycloud.distill.recipe import DistillRecipe
from raycloud.distill.signals import SignalRecipe, compute_signal, frozen_head
from raycloud.distill.transport_costs import cost_weights
from raycloud.models.segments import Segment
from tests.distill.cases import Case, Map
from tests.models.families import tiny


def test_uld_of_the_largest_errs_by_at_most_the_rests() -> None:
    case = Case()
    whole, short = (float(case.loss(ULD(k=k), None).sum.detach()) for k in (None, 20))
    rest = sum(
        float(1 - one[index].softmax(-1).topk(20).values.sum().detach())
        for i, j in case.pairs
        for one, index in ((case.z, i), (case.u, j))
    )
    assert short <= whole <= short + rest and whole - short > 1e-6


def test_mined_teaches_nothing_about_tokens_the_teacher_cannot_say() -> None:
    case = Case()
    (gradient,) = torch.autograd.grad(case.loss(MinED(), None).sum, case.head.weight)
    assert gradient[:31].abs().sum() > 0
    assert gradient[31:].abs().max() == 0


def test_fitted_projectors_keep_the_logits_where_the_spaces_allow() -> None:
    """Case with a teacher head that is the student's in another basis: projected states give the teacher's logits."""
    torch.manual_seed(0)
    head, basis = torch.randn(50, 8).double(), torch.linalg.qr(torch.randn(12, 8).double()).Q
    teacher = head @ basis.T
    g = torch.randn(20, 12).double()
    torch.testing.assert_close(g @ fitted(teacher, head) @ head.T, g @ teacher.T)
    wide = torch.randn(50, 12).double()
    way = torch.linalg.lstsq(head, wide).solution
    torch.testing.assert_close(fitted(wide, head), way.T)


def test_cross_entropy_beside_it_counts_every_token() -> None:
    case = Case()
    loss = case.loss(ULD(), None, ce=1.0)
    entropy = nn.functional.cross_entropy(case.z, case.student.labels, reduction="sum")
    assert float(loss.terms["cross_entropy"]) == pytest.approx(float(entropy.detach()), rel=1e-9)


def test_cost_weights_learn_and_costs_are_weighed_by_what_they_were() -> None:
    case, objective = Case(), MCWKD(k=9)
    extras = case.extras(objective)
    assert isinstance(extras, MCWKDExtras)
    extras.train()
    torch.testing.assert_close(extras.logit_costs.weights, torch.tensor([0.2, 0.5, 0.3]).double())
    loss = case.loss(objective, extras)
    (gradient,) = torch.autograd.grad(loss.sum, extras.state_costs.logits)
    assert gradient.abs().min() > 0
    assert not torch.equal(extras.state_costs.scale, torch.ones(3).double())
    again = case.loss(objective, extras.eval())
    assert float(again.sum.detach()) != pytest.approx(float(loss.sum.detach()), rel=1e-3)


def test_the_semi_dual_potential_climbs_to_the_transport_it_bounds() -> None:
    case, objective = Case(), MCWKD(k=9, solver="semi_dual")
    extras = case.extras(objective)
    assert isinstance(extras, MCWKDExtras)
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
def test_uld_takes_what_a_small_signal_tells(kind: str) -> None:
    model = tiny("llama", dtype=torch.float32)
    segment = Segment(model)
    ids = torch.randint(3, 50, (2, 12))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.roll(ids, -1, 1))
    student = StudentOutput.of(Segment(tiny("llama", dtype=torch.float32, seed=1)), batch)
    head = frozen_head(segment, "float32")
    losses = [
        weighted_sum(
            [(1.0, ULD(k=6))], student, TeacherOutput(compute_signal(segment, "t", batch, recipe, [1.0]), head)
        ).sum
        for recipe in (SignalRecipe(codec="float32"), SignalRecipe(kind=kind, codec="float32", k=8))  # type: ignore[arg-type]
    ]
    assert float(losses[1].detach()) == pytest.approx(float(losses[0].detach()), rel=1e-4)
    few = TeacherOutput(compute_signal(segment, "t", batch, SignalRecipe(kind=kind, k=4), [1.0]), head)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k=6 needs as many from the signal, got 4"):
        weighted_sum([(1.0, ULD(k=6))], student, few)


def ids(*lengths: int) -> TokenIds:
    ids = torch.zeros(sum(lengths), dtype=torch.long)
    return TokenIds(ids, ids, torch.tensor([0, *lengths]).cumsum(0))


def test_the_teachers_token_at_the_same_place_is_of_the_same_text() -> None:
    assert same_position(ids(3, 0, 2), ids(2, 4, 3)).tolist() == [0, 1, -1, 6, 7]
    assert same_position(ids(2, 2), ids(5, 0)).tolist() == [0, 1, -1, -1]


def test_the_published_uld_stands_beside_one_that_goes_by_bytes() -> None:
    """Each objective finds its own pairs of tokens in the forward pass that both share."""
    case = Case()
    both = weighted_sum([(1.0, ULD()), (2.0, ULD(compat="published"))], case.student, case.teacher).sum
    apart = [case.loss(one, None).sum for one in (ULD(), ULD(compat="published"))]
    assert float(both.detach()) == pytest.approx(float((apart[0] + 2 * apart[1]).detach()), rel=1e-9)
    assert float(apart[0].detach()) != pytest.approx(float(apart[1].detach()), rel=1e-3)


@pytest.mark.parametrize("option", ["compat=published", "k=null"])
def test_a_recipe_whose_uld_needs_the_whole_vocabulary_refuses_the_largest(option: str) -> None:
    name, value = option.split("=")
    objective = {"kd": {"name": "uld", name: None if value == "null" else value}}
    with pytest.raises(ValueError, match=r"'topk' is not sufficient for objective\.kd 'uld'; allowed: hidden, logits"):
        DistillRecipe.model_validate({"objective": objective, "signal": {"kind": "topk"}})


def test_the_published_map_lets_the_first_word_speak() -> None:
    given = first_mapped_logits(torch.arange(53.0)[None], Map(), 41)[0]
    assert given[:31].tolist() == list(range(31)) and given[31:].isneginf().all()


def test_the_published_mined_teaches_every_token_and_pushes_down_what_has_no_name() -> None:
    case = Case()
    hidden, weight = torch.autograd.grad(case.loss(MinED(compat="published"), None).sum, [case.h, case.head.weight])
    assert (hidden.abs().sum(-1) > 0).all() and weight[31:].abs().min() > 0


def test_a_bias_steers_attention() -> None:
    query, key, every = torch.randn(1, 3, 4), torch.randn(1, 5, 4), [torch.ones(1, n, dtype=torch.bool) for n in (3, 5)]
    bias = torch.full((1, 3, 5), -100.0)
    bias[0, [0, 1, 2], [4, 0, 2]] = 0.0
    forth, back = attention(query, key, *every, bias)
    assert forth[0].argmax(-1).tolist() == [4, 0, 2] and forth.amax(-1).min() > 0.99
    assert back[0, [4, 0, 2]].argmax(-1).tolist() == [0, 1, 2]


def test_a_prior_has_a_part_in_cross_model_attention() -> None:
    case = Case()
    losses = [
        float(case.loss(one, case.extras(one)).sum.detach()) for one in (DSKDCMA(prior=prior) for prior in (0.0, 1.0))
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_projected_weights_move_to_the_smallest_costs_every_so_often() -> None:
    how = ProjectedCostWeights((0.2, 0.5, 0.3), 2, relative=False)
    uniform = [torch.full((1, n), 1 / n) for n in (2, 3)]
    for step, expected in enumerate([(0.2, 0.5, 0.3)] * 2 + [cost_weights(torch.tensor([0.1, 4.0, 0.5])).tolist()]):
        costs = [torch.full((1, 2, 3), one) for one in (0.1, 3.0 + 2 * step, 0.5)]
        scaled, weights = how.scaled_costs(costs, *uniform)
        assert weights.tolist() == pytest.approx(expected, abs=1e-6)
        assert scaled[:, 0, 0, 0].tolist() == pytest.approx([0.1, 3.0 + 2 * step, 0.5])
    again = ProjectedCostWeights((0.2, 0.5, 0.3), 2, relative=False)
    again.load_state_dict(how.state_dict())
    assert torch.equal(again.untrained, how.untrained) and int(again.count) == 1


def test_fixed_weights_are_no_parameters_and_costs_are_weighed_likewise() -> None:
    how = FixedCostWeights((1.0, 3.0))
    assert not list(how.parameters()) and how.weights.tolist() == [0.25, 0.75]
    costs, uniform = [torch.full((1, 2, 2), one) for one in (2.0, 8.0)], torch.full((1, 2), 0.5)
    how.scaled_costs(costs, uniform, uniform)
    assert how.scaled_costs(costs, uniform, uniform)[0][:, 0, 0, 0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("importance", ["salience", "information"])
def test_the_weights_of_costs_are_logged(importance: str) -> None:
    case, objective = Case(), MCWKD(k=9, importance=importance)  # type: ignore[arg-type]
    loss = case.loss(objective, case.extras(objective))
    logged = {name: float(value) / loss.count for name, value in loss.terms.items() if "_weight/" in name}
    assert logged["mcw_kd/state_weight/distance"] == pytest.approx(0.5)
    assert sum(value for name, value in logged.items() if "/logit" in name) == pytest.approx(1.0)
    assert ("mcw_kd/logit_weight/salience" in logged) == (importance == "salience")


def test_published_transport_is_all_but_a_mean_cost() -> None:
    case = Case()
    means = []
    for options in ({"compat": "published"}, {"compat": "published", "sinkhorn_alpha": 1e-6}):
        objective = MCWKD(k=9, **options)  # type: ignore[arg-type]
        means.append(float(case.loss(objective, case.extras(objective)).terms["mcw_kd/logit_transport"]))
    assert means[0] == pytest.approx(means[1], rel=0.02) and means[0] != means[1]
