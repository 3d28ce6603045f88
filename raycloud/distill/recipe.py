"""The recipe of a distillation: one teacher in the cloud, students at the edges, rounds of averaging."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raycloud.data.recipe import DataRecipe
from raycloud.distill.objective import Objective
from raycloud.distill.objectives import AnyObjective, CrossEntropy
from raycloud.distill.signals import SignalRecipe
from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.models.loading import Device
from raycloud.recipe import Placement, Recipe
from raycloud.training.loop import TrainingRecipe
from raycloud.training.lora import LoraRecipe


class TeacherRecipe(Recipe):
    """The cloud teacher."""

    model: str = "builtin:smollm2-135m-instruct"
    """A hub id, a directory, a GGUF file or a built-in name."""
    replicas: int = Field(1, gt=0)
    """Actors that answer for it, each taking one ``cloud``."""
    placement: Placement = Placement()
    timeout_s: float = Field(300.0, gt=0)
    """How long a student waits for one signal."""
    signals: str | None = None
    """A folder for its signals, computed once for all epochs, students and runs; None asks batch by batch."""


class StudentRecipe(Recipe):
    """What the students start from: the teacher, or a model of their own with its tokenizer, or some blocks of it."""

    model: str | None = None
    """A hub id, a directory or a built-in name; None for the teacher."""
    blocks: int | list[Annotated[int, Field(ge=0)]] | None = None
    """How many of its blocks to keep, or which; None for all."""
    choose: Literal["importance", "spacing"] = "importance"
    """``importance`` keeps the blocks that turn their rows most on calibration text, ``spacing`` every n-th one."""
    calibration: int = Field(64, gt=0)
    """Training samples that importance is measured on."""
    lora: LoraRecipe | None = None
    """Train adapters only, which then are all that crosses in rounds; None trains everything."""
    placement: Placement = Placement()


class ObjectiveRecipe(Recipe):
    """The loss of a response token: ``ce_weight`` · cross-entropy + ``kd_weight`` · what the teacher teaches."""

    ce_weight: float = Field(0.0, ge=0)
    kd_weight: float = Field(1.0, ge=0)
    kd: AnyObjective = Field(default={"name": "forward_kl"}, validate_default=True)
    extras_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of what an objective trains beside the student, such as projectors."""
    health_every: int = Field(10, ge=0)
    """Optimiser steps between two measurements of each term's share of the gradient and of the teacher's entropy;
    0 for none."""

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.ce_weight + self.kd_weight == 0:
            raise ValueError("ce_weight and kd_weight must not both be 0")
        return self

    def weighted(self) -> list[tuple[float, Objective]]:
        """The objectives with a weight."""
        both: list[tuple[float, Objective]] = [(self.kd_weight, self.kd), (self.ce_weight, CrossEntropy())]
        return [(weight, objective) for weight, objective in both if weight]


class EdgeRecipe(Recipe):
    """One edge and the part of the data that is its own."""

    name: str = Field(pattern=r"^[\w-]+$")
    where: dict[str, list[Any]] = {}
    """Columns and the values this edge's rows have there; empty for all rows."""
    part: int = Field(0, ge=0)
    """Which of ``of`` disjoint shards of those rows."""
    of: int = Field(1, gt=0)
    student: StudentRecipe | None = None
    """What this edge's student starts from, where it is not the recipe's."""
    objective: ObjectiveRecipe | None = None
    """How it learns, where that is not the recipe's."""


@dataclass(frozen=True)
class Cohort:
    """Edges with the same student and objective: they start from the same weights and are averaged.

    A run has one, or several that learn from one teacher beside each other.
    """

    name: str
    """That of its first edge."""
    student: StudentRecipe
    objective: ObjectiveRecipe
    edges: tuple[str, ...]


class RoundsRecipe(Recipe):
    """Rounds of training at the edges, each ended by averaging the students that answered."""

    count: int = Field(4, gt=0)
    steps: int = Field(10, gt=0)
    """Optimiser steps of every student in a round."""
    deadline_s: float = Field(600.0, gt=0)
    """A student that has not answered by then is left out of the round."""
    rejoin_s: float = Field(120.0, gt=0)
    """How long a round waits at its beginning for students that are starting again."""
    empty: int = Field(3, gt=0)
    """Rounds in a row that no student answers before the run is given up."""


class EvaluationRecipe(Recipe):
    """Held-out text, told apart by a column, and prompts to complete."""

    split: Literal["valid", "test"] = "test"
    by: str | None = "domain"
    """The column whose values are reported one by one; None for all rows together."""
    samples: int = Field(64, gt=0)
    """Held-out samples of each group."""
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        ["The film is", "This phone", "The president said"], min_length=1
    )
    new_tokens: int = Field(24, gt=0)
    answers: int = Field(0, ge=0)
    """Held-out instructions to answer, for ROUGE-L; 0 for none."""
    generation: GenerationRecipe = GenerationRecipe(new_tokens=64)
    """How they are answered."""


class DistillRecipe(Recipe):
    """Distil students at the edges from a teacher in the cloud."""

    job: Literal["distill"] = "distill"
    output: str = "results/distill"
    """The result directory."""
    seed: int = Field(10, ge=0)
    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What training and signals are computed in; ``auto`` is bfloat16 where the device multiplies it natively.
    Weights that are trained and averaged stay float32, and examinations on a CPU are computed in it."""
    threads: int = Field(0, ge=0)
    """CPU threads of each training actor; 0 divides the node's cores among them."""
    teacher: TeacherRecipe = TeacherRecipe()
    student: StudentRecipe = StudentRecipe()
    data: DataRecipe = DataRecipe()
    edges: list[EdgeRecipe] = Field(default=[EdgeRecipe(name="edge")], min_length=1)
    signal: SignalRecipe = SignalRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    training: TrainingRecipe = TrainingRecipe()
    rounds: RoundsRecipe = RoundsRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @property
    def cohorts(self) -> list[Cohort]:
        """The run's students, in the order of their first edges."""
        found: list[Cohort] = []
        for edge in self.edges:
            what = (edge.student or self.student, edge.objective or self.objective)
            known = next((one for one in found if (one.student, one.objective) == what), None)
            if known is None:
                found.append(Cohort(edge.name, *what, edges=(edge.name,)))
            else:
                found[found.index(known)] = replace(known, edges=(*known.edges, edge.name))
        return found

    def cohort_of(self, edge: EdgeRecipe) -> Cohort:
        """The cohort an edge belongs to."""
        return next(cohort for cohort in self.cohorts if edge.name in cohort.edges)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """What signals are made for: none where they hold all there is to say at any temperature."""
        if self.signal.kind in ("hidden", "logits"):
            return ()
        return tuple(sorted({one.objective.kd.temperature for one in self.cohorts if one.objective.kd_weight}))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [edge.name for edge in self.edges]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"edges: the name '{double[0]}' is given twice")
        for edge in self.edges:
            if edge.part >= edge.of:
                raise ValueError(f"edges: '{edge.name}' has part {edge.part} of {edge.of}; allowed: 0 to {edge.of - 1}")
        kind = self.signal.kind
        for cohort in self.cohorts:
            kd = cohort.objective.kd
            if cohort.objective.kd_weight and kind not in kd.signals:
                allowed = ", ".join(kd.signals)
                raise ValueError(
                    f"signal.kind '{kind}' does not tell enough for objective.kd '{kd.name}'; allowed: {allowed}"
                )
        if self.evaluation.answers and self.data.format == "plain":
            raise ValueError("evaluation.answers needs a data.format with instructions; allowed: alpaca, chat")
        return self
