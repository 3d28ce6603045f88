"""A new objective is its options and its class: recipes, checks, edge and loss take its needs from its record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from raycloud.distill.diagnostics import find_warnings
from raycloud.distill.learner import StudentLearner
from raycloud.distill.objective import (
    OBJECTIVES,
    LossTerms,
    ModelSizes,
    Objective,
    StudentOutput,
    TeacherOutput,
    register,
    weighted_sum,
)
from raycloud.distill.objective_options import OPTIONS, Needs, TeacherObjectiveOptions, register_options
from raycloud.distill.objectives import DIVERGENCES
from raycloud.distill.recipe import DistillRecipe, ObjectiveRecipe
from raycloud.distill.student import check_objective
from raycloud.errors import ModelError, RecipeError
from raycloud.link.meter import Meter
from raycloud.models.loading import load
from raycloud.models.weights import weights_of
from tests.cluster.recipes import small
from tests.distill.cases import Case
from tests.distill.local_teacher import LocalTeacher
from tests.distill.test_diagnostics import SAME


class ToyOptions(TeacherObjectiveOptions):
    """Options of a projected mean squared error."""

    name: Literal["toy"] = "toy"
    requires: ClassVar[Needs] = Needs(
        signals=("hidden",), tokenizers="one", vocabulary_map=True, teacher_embedding=True, extras=True
    )
    strength: float = Field(1.0, gt=0)


class Toy(ToyOptions, Objective):
    """Mean squared error between the student's hidden states and the projected teacher's."""

    def extras(self, sizes: ModelSizes) -> nn.Module:
        return nn.Linear(sizes.teacher_hidden_size, sizes.student_hidden_size)

    def loss(
        self, student: StudentOutput, teacher: TeacherOutput, extras: nn.Module | None, *, chunk: int = 64
    ) -> LossTerms:
        assert extras is not None and teacher.embedding is not None
        total = self.strength * (student.hidden - extras(teacher.hidden())).pow(2).sum()
        return LossTerms(total, {"squares": total.detach()})


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_options(ToyOptions)
    register(Toy)
    yield
    del OPTIONS["toy"], OBJECTIVES["toy"]


def objective(**kd: Any) -> ObjectiveRecipe:
    return ObjectiveRecipe.parse({"kd": {"name": "toy", **kd}})


def test_a_recipe_reads_checks_and_writes_it() -> None:
    recipe = DistillRecipe.parse({"objective": {"kd": {"name": "toy", "strength": 2}}})
    assert isinstance(recipe.objective.kd, ToyOptions) and recipe.objective.kd.strength == 2
    assert recipe.model_dump(mode="json")["objective"]["kd"] == {"name": "toy", "temperature": 1.0, "strength": 2.0}
    assert DistillRecipe.model_validate(recipe.model_dump()) == recipe
    for override, line in (
        ("objective.kd.strength=0", "objective.kd.strength: input should be greater than 0, got 0"),
        ("signal.kind=topk", "'topk' is not sufficient for objective.kd 'toy'; allowed: hidden"),
        ("objective.kd.weight=1", "unknown key 'objective.kd.weight'"),
        ("objective.kd.name=toys", "input tag 'toys' found using 'name' does not match"),
    ):
        with pytest.raises(RecipeError, match=line):
            DistillRecipe.parse({"objective": {"kd": {"name": "toy"}}}, [override])
    with pytest.raises(RecipeError, match="input tag 'toy'"):
        ObjectiveRecipe.parse({"kd": {"name": "dskd", "divergence": {"name": "toy"}}})


def test_its_tokenizers_are_checked() -> None:
    check_objective(objective(), two_tokenizers=False)
    with pytest.raises(ModelError, match="'toy' needs one tokenizer"):
        check_objective(objective(), two_tokenizers=True)
    check_objective(objective().model_copy(update={"kd_weight": 0.0, "ce_weight": 1.0}), two_tokenizers=True)


def test_its_map_between_vocabularies_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = replace(SAME, eos_mapped=False)
    assert "eos" in find_warnings(objective(), poor)
    monkeypatch.setattr(ToyOptions, "requires", Needs(signals=("hidden",)))
    assert "eos" not in find_warnings(objective(), poor)


def test_its_loss_is_summed_with_others() -> None:
    case, (toy,) = Case(same=True), [one for _, one in objective(strength=3).weighted()]
    extras = case.extras(toy)
    loss = weighted_sum([(0.5, toy)], case.student, case.teacher, {"toy": extras} if extras else {})
    squares: Tensor = 3 * (case.h - extras(case.g)).pow(2).sum()  # type: ignore[misc]
    torch.testing.assert_close(loss.sum, 0.5 * squares)
    with pytest.raises(ValueError, match="'toy' needs the module that it trains beside the student"):
        weighted_sum([(1.0, toy)], case.student, case.teacher)


@pytest.mark.parametrize(("kd", "asked"), [("toy", ["head", "embedding"]), ("forward_kl", ["head"])])
def test_an_edge_fetches_what_it_needs(tiny_llama: Path, tmp_path: Path, kd: str, asked: list[str]) -> None:
    loaded = load(str(tiny_llama), device="cpu")
    teacher = LocalTeacher(loaded)
    recipe = small(tiny_llama, tmp_path / "run", objective={"kd": {"name": kd}})
    student = StudentLearner(recipe, recipe.edges[0], loaded.model.config, teacher, tmp_path / "student", threads=1)
    student._resumed(0, {name: tensor.clone() for name, tensor in weights_of(loaded.model).items()}, Meter())
    assert teacher.asked == asked
    assert (student._extras is not None) == (kd == "toy")


def test_divergences_are_those_registered() -> None:
    assert list(DIVERGENCES) == [name for name, options in OPTIONS.items() if name in DIVERGENCES]
    assert OPTIONS.keys() == OBJECTIVES.keys()
    for name, options in OPTIONS.items():
        assert issubclass(OBJECTIVES[name], options)
