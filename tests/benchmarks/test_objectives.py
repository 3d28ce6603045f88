"""The dense formulations of the benchmark are other programs for the same numbers."""

from __future__ import annotations

import pytest

from raycloud.benchmarks import objectives
from raycloud.benchmarks.objectives import OBJECTIVES, Case, difference
from raycloud.distill.objectives import OBJECTIVES as REGISTRY
from raycloud.distill.objectives import CrossEntropy

EXACT = [name for name in OBJECTIVES if "top-" not in name]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "BATCH": 2, "LENGTH": 128, "STUDENT_WORDS": 900, "TEACHER_WORDS": 1300, "STUDENT_WIDTH": 24,
        "TEACHER_WIDTH": 40, "_SHARED": 700,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(objectives, name, value)


@pytest.mark.parametrize("name", EXACT)
def test_both_formulations_agree(name: str) -> None:
    case = Case(name)
    assert difference(case.ours(), case.dense()) <= 1e-4


def test_every_objective_of_the_registry_is_measured() -> None:
    measured = {make().name for make in OBJECTIVES.values()}
    assert measured == {*REGISTRY, CrossEntropy().name}


def test_an_approximation_is_told_from_the_exact_one() -> None:
    case = Case("uld top-128")
    assert difference(case.ours(), case.dense()) > 1e-4
