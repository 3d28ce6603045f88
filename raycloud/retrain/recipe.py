"""Recipe of block retraining: a cloud's model, edges whose domains drift, and what a window of an edge may cost."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raycloud.data.prompts import Format
from raycloud.models.devices import Device
from raycloud.models.texts import Bos
from raycloud.recipe import Bundle, Placement, Recipe
from raycloud.training.recipe import TrainingRecipe

TaskName = Literal["classification", "token_tagging", "language_modelling"]
Supervision = Literal["labels", "none"]
LEAST_OF_MEANS = 64
"""Least number of samples over which an edge may send means of hidden states."""


class RetrainDataRecipe(Recipe):
    """Texts or images of several domains."""

    source: str = "builtin:reviews"
    """Texts: ``builtin:reviews``, ``builtin:instruct``, a JSONL, JSON or Parquet file, or a hub id. Images:
    ``builtin:digits``, or a folder with a folder of images for each class in a folder for each domain."""
    domain: str = "domain"
    """Column of texts that names the domain."""
    source_domain: str = "movie"
    """Domain that the cloud's model comes from; drift is the distance from it. ``source`` for ``builtin:digits``."""
    text: str = "text"
    """Column of the text; of token tagging, the list of its words."""
    label: str = "label"
    """Column of the class; of token tagging, the list of its words' classes."""
    classes: list[Any] | None = None
    """Classes in the order of the model's outputs; None for the sorted values of ``label``."""
    format: Format = "plain"
    """Format of texts for language modelling. Of ``alpaca`` and ``chat``, answers are the labelled tokens, and without
    labels the tokens of prompts are."""
    bos: Bos = "auto"
    max_length: int = Field(64, gt=1)
    """Number of tokens of a sample: plain texts of language modelling are packed to it, others are shortened."""

    @property
    def validation(self) -> None:
        """No other source: parts of each domain are held out."""


class SourceRecipe(Recipe):
    """Training of the whole model on its source domain in the cloud, before edges get it."""

    steps: int = Field(0, ge=0)
    """Number of steps; 0 for a model that is trained already."""
    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(32, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class RetrainEdgeRecipe(Recipe):
    """Edge and the domains that it meets."""

    name: str = Field(pattern=r"^[\w-]+$")
    windows: list[str] = Field(min_length=1)
    """Domain of each of its windows, in order."""
    source: str | None = None
    """Data of the edge, read only there; None for those of the recipe."""
    device: bool = False
    """True for a device without Ray, which takes part by ``raycloud edge learn`` and brings its own data. It takes no
    resources of the cluster."""


class BudgetRecipe(Recipe):
    """Budget of one window of an edge: all that it pays, estimates and judgement of the result included."""

    full_steps: int | None = Field(40, gt=0)
    """Operations of this many steps of full fine-tuning; None for no limit but ``flops``."""
    flops: float | None = Field(None, gt=0)
    """Floating-point operations; None for no limit but ``full_steps``."""
    memory_share: float | None = Field(1.0, gt=0)
    """Peak memory as a share of what full fine-tuning takes; None for no limit but ``memory``."""
    memory: float | None = Field(None, gt=0)
    """Bytes of memory; None for no limit but ``memory_share``."""
    bytes: float | None = Field(None, gt=0)
    """Bytes that an update may have on the link; None for no limit."""


class DriftRecipe(Recipe):
    """Detector of drift at the edges."""

    window: int = Field(64, ge=2)
    """Number of the last samples of a window from which drift is judged."""
    quantile: float = Field(0.99, gt=0, lt=1)
    """Share of clean windows without an alarm."""
    radius: float = Field(0.5, gt=0)
    """Largest distance of two signatures of the same domain."""
    cool_down: int = Field(0, ge=0)
    """Number of windows after a retraining in which no drift is answered."""
    every: int | None = Field(None, gt=0)
    """Retrain every so many windows even without a drift; None only on drift."""


class RetrainTraining(Recipe):
    """Settings of the training of blocks at an edge."""

    lr: float = Field(3e-3, gt=0)
    """Peak learning rate of the blocks."""
    head_lr: float = Field(1e-2, gt=0)
    """Peak learning rate of the head."""
    warmup_steps: int = Field(5, ge=0)
    batch_size: int = Field(32, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    head_steps: int = Field(100, ge=0)
    """Largest number of first steps that train the head alone, before the blocks (Kumar et al. 2022, arXiv 2202.10054):
    a head that does not fit a domain yet would distort the blocks below."""
    head_share: float = Field(0.05, gt=0, le=1)
    """Largest share of a window's operations that these steps take. All blocks run once for them."""
    late_head_lr: float = Field(3e-3, gt=0)
    """Peak learning rate of the head while blocks are trained after it."""
    replay: float = Field(0.0, ge=0, lt=1)
    """Share of each batch that comes from source samples, against forgetting."""

    def training(self) -> TrainingRecipe:
        """Return the settings of the training loop."""
        return TrainingRecipe(
            lr=self.lr, warmup_steps=self.warmup_steps, batch_size=self.batch_size, weight_decay=self.weight_decay
        )


class PriorRecipe(Recipe):
    """Domains from which the cloud learns what retraining gives, before edges ask."""

    domains: list[str] = []
    """Domains that the cloud adapts copies of its model to, each time with other blocks, within the budget of a window.
    None of them needs to be a domain that edges meet. Empty for a plan that prefers no block."""


class RetrainRoundsRecipe(Recipe):
    """Rounds: one for each window, in which the updates of all edges are merged."""

    quorum: int = Field(1, gt=0)
    """Least number of updates that make a new version."""
    deadline_s: float = Field(600.0, gt=0)
    """Seconds; an edge that has not answered by then is left out of the round."""


class RetrainRecipe(Recipe):
    """Block retraining of a cloud's model at edges whose domains drift."""

    job: Literal["retrain"] = "retrain"
    output: str = "results/retrain"
    """Result directory."""
    seed: int = Field(10, ge=0)
    device: Device = "auto"
    threads: int = Field(0, ge=0)
    """CPU threads of each actor; 0 divides the node's cores among them."""
    model: str | dict[str, Any] = "builtin:smollm2-135m-instruct"
    """Hub id, directory, GGUF file or built-in name; or a configuration, with ``model_type``, of a new model."""
    tokenizer: str | None = None
    """Model whose tokenizer a new model for texts gets."""
    task: TaskName = "language_modelling"
    supervision: Supervision = "labels"
    """``none`` never reads labels at an edge: sure predictions are made surer, and of language models the perplexity of
    texts or prompts falls."""
    data: RetrainDataRecipe = RetrainDataRecipe()
    source: SourceRecipe = SourceRecipe()
    edges: Annotated[list[RetrainEdgeRecipe], Field(min_length=1)] = [
        RetrainEdgeRecipe(name="edge", windows=["movie", "product", "product", "tweet"])
    ]
    samples: int = Field(96, ge=10)
    """Number of samples of a window."""
    test_samples: int = Field(256, gt=0)
    """Largest number of held-out samples of a domain that models are evaluated on; a window does not pay for it."""
    budget: BudgetRecipe = BudgetRecipe()
    training: RetrainTraining = RetrainTraining()
    prior: PriorRecipe = PriorRecipe()
    drift: DriftRecipe = DriftRecipe()
    rounds: RetrainRoundsRecipe = RetrainRoundsRecipe()
    mode: Literal["retrain", "suggest", "dry_run"] = "retrain"
    """``suggest`` prints each plan with its predicted gain and cost, and changes nothing. ``dry_run`` trains the plan,
    reports its gain, and restores the model; nothing is sent."""
    least_gain: float = Field(0.0, ge=0)
    """Least predicted fall of the error for which a window is retrained."""
    statistics: Literal["distances", "means"] = "distances"
    """What an edge tells of its hidden states: distances from the source, or also their means behind each block, over a
    window of 64 samples or more. Means tell more of the texts; see ``raycloud privacy``."""
    cloud_placement: Placement = Placement()
    edge_placement: Placement = Placement()

    @property
    def devices(self) -> list[RetrainEdgeRecipe]:
        """Edges that are devices without Ray."""
        return [edge for edge in self.edges if edge.device]

    def for_device(self, edge: RetrainEdgeRecipe) -> RetrainRecipe:
        """Recipe as a device gets it: with its own edge."""
        rounds = self.rounds.model_copy(update={"quorum": 1})  # a matter of the cloud, which counts all edges
        return self.model_copy(update={"edges": [edge], "rounds": rounds})

    @property
    def metric(self) -> Literal["accuracy", "perplexity"]:
        """Figure of the task's error."""
        return "perplexity" if self.task == "language_modelling" else "accuracy"

    @property
    def windows(self) -> int:
        """Number of windows of the edge with the most."""
        return max(len(edge.windows) for edge in self.edges)

    @property
    def domains(self) -> list[str]:
        """Domains of all edges and the source, sorted."""
        return sorted({self.data.source_domain, *(domain for edge in self.edges for domain in edge.windows)})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [edge.name for edge in self.edges]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"edges: the name '{double[0]}' is given twice")
        if self.rounds.quorum > len(names):
            raise ValueError(
                f"rounds.quorum={self.rounds.quorum}, and there are {len(names)} edges; allowed: 1 to {len(names)}"
            )
        if self.drift.window > self.samples:
            raise ValueError(
                f"drift.window={self.drift.window}, and a window has samples={self.samples}; allowed: at most these"
            )
        if self.statistics == "means" and self.drift.window < LEAST_OF_MEANS:
            raise ValueError(
                f"statistics=means over drift.window={self.drift.window} samples; allowed: {LEAST_OF_MEANS} or more"
            )
        if self.budget.full_steps is None and self.budget.flops is None:
            raise ValueError("budget.full_steps and budget.flops are null; allowed: one of them, or both")
        if isinstance(self.model, dict) and "model_type" not in self.model:
            raise ValueError("model is a configuration without model_type; allowed: one with it, or a name")
        if self.task != "language_modelling" and self.data.format != "plain":
            raise ValueError(f"data.format={self.data.format} with task={self.task}; allowed: plain")
        for edge in self.edges:
            if edge.device and edge.source is not None:
                raise ValueError(f"edges: the device '{edge.name}' brings its data; allowed: no source")
        return self


def bundles(recipe: RetrainRecipe) -> list[Bundle]:
    """Return the resources of the cloud's actor, then of one for each edge that is no device."""
    edges = [recipe.edge_placement.bundle("edge") for edge in recipe.edges if not edge.device]
    return [recipe.cloud_placement.bundle("cloud"), *edges]
