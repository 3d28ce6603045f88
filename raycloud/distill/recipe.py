"""Recipe of a distillation: one teacher in the cloud, students at the edges, rounds of averaging."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raycloud.data.recipe import DataRecipe
from raycloud.distill.objective_options import AnyObjectiveOptions, Needs
from raycloud.distill.signal_recipe import SignalRecipe
from raycloud.evaluation.recipe import GenerationRecipe
from raycloud.models.devices import Device
from raycloud.recipe import Bundle, Placement, Recipe
from raycloud.rounds.recipe import AggregatorName, KeptVersions
from raycloud.training.recipe import LoraRecipe, TrainingRecipe

if TYPE_CHECKING:
    from raycloud.distill.objective import Objective


class TeacherRecipe(Recipe):
    """The teacher in the cloud."""

    model: str = "builtin:smollm2-135m-instruct"
    """Hub id, directory, GGUF file or built-in name."""
    replicas: int = Field(1, gt=0)
    """Number of teacher actors; each takes one unit of the ``cloud`` resource."""
    placement: Placement = Placement()
    timeout_s: float = Field(300.0, gt=0)
    """Seconds that a student waits for one answer of the teacher: a signal, the tokenizer, the head, the embedding or
    frozen weights."""
    signals: str | None = None
    """Folder for the teacher's signals, computed once for all epochs, students and runs; None asks for them batch by
    batch."""


class StudentRecipe(Recipe):
    """Initial student model: the teacher or another model, whole or only some of its blocks."""

    model: str | None = None
    """Hub id, directory, GGUF file or built-in name; None for the teacher. Its tokenizer may be the teacher's or
    another."""
    blocks: int | list[Annotated[int, Field(ge=0)]] | None = None
    """Number of blocks to keep, or their indices; None keeps all."""
    choose: Literal["importance", "spacing"] = "importance"
    """``importance`` keeps the blocks that change the direction of hidden states most on calibration text, ``spacing``
    keeps evenly spaced blocks."""
    calibration: int = Field(64, gt=0)
    """Number of training samples on which importance is measured."""
    lora: LoraRecipe | None = None
    """Train adapters only: only adapters, not all weights, are exchanged after a round. None trains all weights."""
    placement: Placement = Placement()


class ObjectiveRecipe(Recipe):
    """Loss of a response token: ``ce_weight`` · cross-entropy + ``kd_weight`` · distillation objective."""

    renamed: ClassVar[dict[str, str]] = {"health_every": "diagnostics_every"}

    ce_weight: float = Field(0.0, ge=0)
    kd_weight: float = Field(1.0, ge=0)
    kd: AnyObjectiveOptions = Field(default={"name": "forward_kl"}, validate_default=True)
    extras_lr: float = Field(1e-3, gt=0)
    """Peak learning rate of the modules that an objective trains beside the student, such as projectors."""
    diagnostics_every: int = Field(10, ge=0)
    """Optimiser steps between two measurements of each term's share of the gradient and of the teacher's entropy; 0
    measures nothing."""

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        if self.ce_weight + self.kd_weight == 0:
            raise ValueError("ce_weight and kd_weight must not both be 0")
        return self

    @property
    def needs(self) -> Needs:
        """Needs of learning with these weights: those of the objective, or none if its weight is 0."""
        return self.kd.needs if self.kd_weight else Needs()

    def weighted(self) -> list[tuple[float, Objective]]:
        """The objectives whose weight is not 0, with their weights."""
        from raycloud.distill.objectives import (  # with torch, which a recipe is read without
            CrossEntropy,
            build_objective,
        )

        both: list[tuple[float, Objective]] = [
            (self.kd_weight, build_objective(self.kd)),
            (self.ce_weight, CrossEntropy()),
        ]
        return [(weight, objective) for weight, objective in both if weight]


class DistillEdgeRecipe(Recipe):
    """One edge and its own part of the data."""

    name: str = Field(pattern=r"^[\w-]+$")
    where: dict[str, list[Any]] = {}
    """Columns and the allowed values of this edge's rows; empty selects all rows."""
    part: int = Field(0, ge=0)
    """Index of this edge's shard among ``of`` disjoint shards of the selected rows."""
    of: int = Field(1, gt=0)
    student: StudentRecipe | None = None
    """Initial student of this edge, if it differs from the recipe's ``student``."""
    objective: ObjectiveRecipe | None = None
    """Objective of this edge, if it differs from the recipe's ``objective``."""
    device: bool = False
    """True for a device without Ray, which takes part by ``raycloud edge learn`` and brings its own data. It takes no
    resources of the cluster."""


@dataclass(frozen=True)
class Cohort:
    """Edges with the same student and objective: they start from the same weights and are averaged.

    A run has one cohort, or several that learn from the same teacher side by side.
    """

    name: str
    """Name of the cohort's first edge."""
    student: StudentRecipe
    objective: ObjectiveRecipe
    edges: tuple[str, ...]


class DistillRoundsRecipe(Recipe):
    """Rounds of training at the edges. Each round ends by aggregating the students that answered."""

    count: int = Field(4, gt=0)
    steps: int = Field(10, gt=0)
    """Optimiser steps of each student per round."""
    aggregation: AggregatorName = "mean"
    """``mean`` weights students by their tokens. ``trimmed_mean`` drops the lowest and highest fifth of each number,
    from five students on, and ``median`` takes the middle; both resist a few wrong students and do not count tokens."""
    deadline_s: float = Field(600.0, gt=0)
    """Seconds; a student that has not answered by then is left out of the round."""
    quorum: int = Field(1, gt=0)
    """Least number of students of a cohort whose updates make new weights. With fewer, the updates are discarded and
    the cohort keeps its weights."""
    gate: Literal["none", "held_out"] = "none"
    """``held_out`` keeps the aggregate of a round only if its perplexity on held-out text is not above that of the
    former weights. It costs one evaluation per cohort and round."""
    keep_versions: KeptVersions | None = None
    """Number of newest versions that ``versions/`` keeps; None for all. Without adapters each takes as much as the
    student."""
    rejoin_s: float = Field(120.0, gt=0)
    """Seconds that the start of a round waits for students that are restarting."""
    empty: int = Field(3, gt=0)
    """Number of attempts at a round without any answer after which the run fails."""


class DistillEvaluationRecipe(Recipe):
    """Held-out text, grouped by a column, and prompts to complete."""

    renamed: ClassVar[dict[str, str]] = {"samples": "held_out_samples", "new_tokens": "max_new_tokens"}

    split: Literal["valid", "test"] = "test"
    by: str | None = "domain"
    """Column whose values are reported separately; None reports all rows together."""
    held_out_samples: int = Field(64, gt=0)
    """Held-out samples per group."""
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        ["The film is", "This phone", "The president said"], min_length=1
    )
    max_new_tokens: int = Field(24, gt=0)
    answers: int = Field(0, ge=0)
    """Number of held-out instructions to answer for ROUGE-L; 0 for none."""
    generation: GenerationRecipe = GenerationRecipe(max_new_tokens=64)
    """Generation settings for these answers."""


class DistillRecipe(Recipe):
    """Distillation of students at the edges from a teacher in the cloud."""

    job: Literal["distill"] = "distill"
    output: str = "results/distill"
    """Result directory."""
    seed: int = Field(10, ge=0)
    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of training and signals; ``auto`` is bfloat16 if the device multiplies it natively. Weights that are
    trained and averaged stay float32, and evaluation on a CPU uses float32."""
    threads: int = Field(0, ge=0)
    """CPU threads of each training actor; 0 divides the node's cores among them."""
    teacher: TeacherRecipe = TeacherRecipe()
    student: StudentRecipe = StudentRecipe()
    data: DataRecipe = DataRecipe()
    edges: list[DistillEdgeRecipe] = Field(default=[DistillEdgeRecipe(name="edge")], min_length=1)
    signal: SignalRecipe = SignalRecipe()
    objective: ObjectiveRecipe = ObjectiveRecipe()
    training: TrainingRecipe = TrainingRecipe()
    """Settings of the students' training."""
    rounds: DistillRoundsRecipe = DistillRoundsRecipe()
    evaluation: DistillEvaluationRecipe = DistillEvaluationRecipe()

    @property
    def cohorts(self) -> list[Cohort]:
        """Cohorts of the run, in the order of their first edges."""
        found: list[Cohort] = []
        for edge in self.edges:
            what = (edge.student or self.student, edge.objective or self.objective)
            known = next((one for one in found if (one.student, one.objective) == what), None)
            if known is None:
                found.append(Cohort(edge.name, *what, edges=(edge.name,)))
            else:
                found[found.index(known)] = replace(known, edges=(*known.edges, edge.name))
        return found

    def cohort_of(self, edge: DistillEdgeRecipe) -> Cohort:
        """Cohort that an edge belongs to."""
        return next(cohort for cohort in self.cohorts if edge.name in cohort.edges)

    @property
    def devices(self) -> list[DistillEdgeRecipe]:
        """Edges that are devices without Ray."""
        return [edge for edge in self.edges if edge.device]

    def for_device(self, edge: DistillEdgeRecipe) -> DistillRecipe:
        """Recipe as a device gets it: with its own edge, and one of each other cohort, whose temperatures count."""
        others = [cohort.edges[0] for cohort in self.cohorts if edge.name not in cohort.edges]
        kept = [one for one in self.edges if one.name == edge.name or one.name in others]
        teacher = self.teacher.model_copy(update={"signals": None})
        rounds = self.rounds.model_copy(update={"quorum": 1})  # a matter of the cloud, which counts all edges
        return self.model_copy(update={"edges": kept, "teacher": teacher, "rounds": rounds})

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures that signals are computed for; empty for kinds that are valid at every temperature."""
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
            if edge.device and (edge.where or edge.of > 1):
                raise ValueError(f"edges: the device '{edge.name}' brings its data; allowed: no where, part and of")
            if edge.part >= edge.of:
                raise ValueError(f"edges: '{edge.name}' has part {edge.part} of {edge.of}; allowed: 0 to {edge.of - 1}")
        smallest = min(self.cohorts, key=lambda cohort: len(cohort.edges))
        if self.rounds.quorum > len(smallest.edges):
            raise ValueError(
                f"rounds.quorum={self.rounds.quorum}, and cohort '{smallest.name}' has {len(smallest.edges)} edges; "
                f"allowed: 1 to {len(smallest.edges)}"
            )
        kind = self.signal.kind
        for cohort in self.cohorts:
            kd, needs = cohort.objective.kd, cohort.objective.needs
            if kind not in needs.signals:
                allowed = ", ".join(needs.signals)
                raise ValueError(
                    f"signal.kind '{kind}' is not sufficient for objective.kd '{kd.name}'; allowed: {allowed}"
                )
        if self.evaluation.answers and self.data.format == "plain":
            raise ValueError("evaluation.answers needs a data.format with instructions; allowed: alpaca, chat")
        return self


def bundles(recipe: DistillRecipe) -> list[Bundle]:
    """Return the resources of the teacher's replicas, then of one student per edge that is no device."""
    teachers = [recipe.teacher.placement.bundle("cloud")] * recipe.teacher.replicas
    actors = [edge for edge in recipe.edges if not edge.device]
    return teachers + [recipe.cohort_of(edge).student.placement.bundle("edge") for edge in actors]
