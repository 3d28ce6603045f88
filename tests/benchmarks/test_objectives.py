"""Equality of the dense formulations of the benchmark and the objectives."""

from __future__ import annotations

import pytest

from raycloud.benchmarks.objectives import EXACT, OBJECTIVES, ObjectiveCase, difference
from raycloud.distill.objectives import OBJECTIVES as REGISTRY
from raycloud.distill.objectives import CrossEntropy


@pytest.mark.parametrize("name", EXACT)
def test_both_formulations_agree(name: str) -> None:
    case = ObjectiveCase(name, "small")
    assert difference(case.ours(), case.dense()) <= 1e-4


def test_every_objective_of_the_registry_is_measured() -> None:
    measured = {make().name for make in OBJECTIVES.values()}
    assert measured == {*REGISTRY, CrossEntropy().name}


def test_an_approximation_is_told_from_the_exact_one() -> None:
    case = ObjectiveCase("uld top-128", "small")
    assert difference(case.ours(), case.dense()) > 1e-4
