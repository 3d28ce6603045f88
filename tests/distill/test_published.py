"""Objectives against numbers computed by the published programs; ``published/make.py`` made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raycloud.distill.objectives import OBJECTIVES
from raycloud.distill.optimal_transport import semi_dual
from tests.distill import formulas
from tests.distill.cases import Case
from tests.distill.published.make import PROGRAMS, checksum
from tests.distill.published.programs import transport_problem

FILES = [json.loads(path.read_text()) for path in sorted(Path(__file__).with_name("published").glob("*.json"))]
COMMITS = {file["program"].removeprefix("https://github.com/"): file["commit"] for file in FILES}
EVERY = [run | {"program": program} for file, program in zip(FILES, COMMITS, strict=True) for run in file["runs"]]
RUNS = [
    pytest.param(run, id=f"{run['program']} {' '.join(str(one) for one in run['objective'].values())} {number}")
    for number, run in enumerate(EVERY)
]


def case_of(run: dict[str, Any]) -> Case:
    case = Case(**run["case"])
    return case if run["text"] is None else case.alone(run["text"])


def ours(run: dict[str, Any], case: Case, **changed: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Compute our loss with the options of a run, its terms without the objective's name, and the trained modules."""
    options = run["objective"] | changed
    name = options.pop("name")
    objective = OBJECTIVES[name](**options)
    extras = case.extras(objective)
    loss = case.loss(objective, extras)
    return loss.sum, {term.removeprefix(f"{name}/"): value for term, value in loss.terms.items()}, extras


@pytest.mark.parametrize("run", RUNS)
def test_the_published_program_gives_the_same(run: dict[str, Any]) -> None:
    case = case_of(run)
    value, terms, extras = ours(run, case)
    assert checksum(case, extras) == pytest.approx(run["inputs"], rel=1e-6), "the program was run on other inputs"
    parameters = {} if extras is None else dict(extras.named_parameters())
    inputs = [case.h, *(parameters[name] for name in run["trained"])]
    found = torch.autograd.grad(value, inputs)
    if run["less"]:
        less, _, other = ours(run, case, **run["less"])
        others = dict(other.named_parameters())
        rest = torch.autograd.grad(less, [case.h, *(others[name] for name in run["trained"])], allow_unused=True)
        found = tuple(a if b is None else a - b for a, b in zip(found, rest, strict=True))
        value = value - less
    times, unlike = run["times"], run["unlike"] or ""
    if "value" not in unlike:
        assert float(value.detach()) == pytest.approx(run["value"] * times, rel=1e-5)
    for name, wanted in run["terms"].items():
        assert float(terms[name]) == pytest.approx(wanted * times, rel=1e-5)
    if "gradient" not in unlike:
        wanted = torch.tensor(run["gradient"]).double() * times
        assert float((found[0] - wanted).norm() / wanted.norm()) < 1e-5
        for one, (norm, total) in zip(found[1:], run["trained"].values(), strict=True):
            assert float(one.norm()) == pytest.approx(norm * times, rel=1e-4)
            assert float(one.sum()) == pytest.approx(total * times, rel=1e-4, abs=1e-4 * norm * times)


def test_every_objective_and_every_published_option_was_compared() -> None:
    compared = {
        (run["objective"]["name"], run["objective"].get("compat", "ours")) for run in EVERY if not run["unlike"]
    }
    modes = set()
    for name, make in OBJECTIVES.items():
        allowed = make.model_fields["compat"].annotation if "compat" in make.model_fields else None  # type: ignore[attr-defined]
        published = set(getattr(allowed, "__args__", ())) - {"ours"}
        modes |= {(name, mode) for mode in published or {"ours"}}
    assert modes <= compared and ("dskd", "ours") in compared  # version 1 has no other mode
    assert COMMITS == PROGRAMS


def test_the_authors_adaptive_kl_ends_the_head_one_word_before() -> None:
    (run,) = (run for run in EVERY if run["program"] == "wutaiqiang/LLM_KD_AKL")
    case = case_of(run)
    p, q = case.u.softmax(-1), case.z.softmax(-1)
    total = case.h.new_zeros(())
    for pi, qi in zip(p, q, strict=True):
        order = pi.argsort(descending=True)
        head = pi[order].cumsum(0) <= 0.5
        head[0] = True
        gap = (pi - qi).abs()[order].detach()
        share = gap[head].sum() / gap.sum()
        total = total + share * formulas.kl(pi, qi) + (1 - share) * formulas.kl(qi, pi)
    assert float(total.detach()) == pytest.approx(run["value"] * run["times"], rel=1e-5)
    assert float(ours(run, case)[0].detach()) != pytest.approx(run["value"] * run["times"], rel=1e-4)


def test_the_semi_dual_bound_is_that_of_the_second_program() -> None:
    (run,) = (file["semi_dual"] for file in FILES if "semi_dual" in file)
    phi, costs = transport_problem()
    mu, nu = (torch.full((1, n), 1 / n, dtype=torch.float64) for n in costs.shape[1:])
    bound = semi_dual(phi[None], costs[:, None], mu, nu, 0.1, torch.full((3,), 1 / 3))
    assert float(bound.detach()) == pytest.approx(run["value"], rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(bound.sum(), costs)[0], torch.tensor(run["gradient"]).double())
