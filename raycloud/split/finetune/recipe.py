"""The recipe of split fine-tuning."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from raycloud.data.prompts import Format
from raycloud.evaluation.labels import Metric
from raycloud.models.loading import Device
from raycloud.recipe import Placement, Recipe
from raycloud.split.finetune.numbers import Form
from raycloud.split.recipe import NetworkRecipe
from raycloud.training.loop import TrainingRecipe
from raycloud.training.lora import LoraRecipe

Column = Annotated[str, Field(min_length=1)]


class TextsRecipe(Recipe):
    """Texts with labels."""

    source: str = "builtin:reviews"
    """``builtin:reviews``, a JSONL or Parquet file, or a hub id, with its configuration as in ``nyu-mll/glue:cola``."""
    where: dict[str, list[Any]] = {}
    """Only rows whose columns hold one of these values."""
    max_length: int = Field(128, gt=1)
    """Tokens of a text."""
    limit: int | None = Field(None, gt=0)
    """So many rows of the training split, evenly spread over it; None for all."""
    held_out: int | None = Field(None, gt=0)
    """So many rows of the split that is held out; None for all."""
    held_out_split: str = Field("test", min_length=1)
    """``test``, ``valid``, or a name that a hub set itself uses, such as ``validation_matched``."""


class ClassificationRecipe(Recipe):
    """One of several classes for a text or a pair of texts."""

    kind: Literal["classification"] = "classification"
    text: Column = "text"
    """Column of the text."""
    pair: Column | None = None
    """Column of a second text."""
    label: Column = "label"
    classes: list[Any] | None = Field(None, min_length=2)
    """Values of the label, in the order of the classes; rows with others are left out. None for all, sorted."""
    pooling: Literal["mean", "first"] = "mean"
    """What the head reads of a text: the mean of its rows, or the first one, through the model's own pooler."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Ahead of the classifier."""
    metrics: list[Metric] = Field(["accuracy"], min_length=1)


class RegressionRecipe(Recipe):
    """One number for a text or a pair of texts."""

    kind: Literal["regression"] = "regression"
    text: Column = "text"
    pair: Column | None = None
    label: Column = "score"
    pooling: Literal["mean", "first"] = "mean"
    dropout: float = Field(0.1, ge=0, lt=1)
    metrics: list[Metric] = Field(["pearson", "spearman"], min_length=1)


class LanguageRecipe(Recipe):
    """The next token of a response."""

    kind: Literal["language"] = "language"
    format: Format = "alpaca"
    max_prompt: int = Field(112, gt=0)


class SpanRecipe(Recipe):
    """Where in a text the answer to a question stands, as in SQuAD; long texts are read in overlapping windows."""

    kind: Literal["span"] = "span"
    question: Column = "question"
    context: Column = "context"
    """Column of the text."""
    answers: Column = "answers"
    """Column of a map of ``text`` and ``answer_start``."""
    max_question: int = Field(64, gt=0)
    """Tokens of a question."""
    stride: int = Field(128, ge=0)
    """Tokens that two windows share."""
    max_answer: int = Field(30, gt=0)
    """Tokens of an answer."""


TaskRecipe = Annotated[
    ClassificationRecipe | RegressionRecipe | SpanRecipe | LanguageRecipe, Field(discriminator="kind")
]


class CutRecipe(Recipe):
    """What crosses the first cut."""

    kind: Literal["narrow", "plain", "sft"] = "narrow"
    """``narrow`` keeps the residual stream and trains its maps; ``plain`` sends rows as they are; ``sft`` is the
    published cut inside the last block of the edge's first part, which drops the residual."""
    rank: int = Field(32, gt=0)
    """Numbers for each row; of no meaning for ``plain``."""
    outliers: int = Field(0, ge=0)
    """Coordinates that cross beside them as they are; ``narrow`` only. Decoders need a few: their row at the first
    token is a hundred times longer than all others."""
    trained: bool = True
    """Whether each map of ``narrow`` learns with the side that holds it."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of these maps; None for ``training.lr``, or a tenth of it with ``lora``, since what adapters
    learn by is too much for whole matrices."""
    form: Form = "int8"
    """How a number crosses, and its gradient."""
    changes: bool = False
    """From a text's second visit on only send how its numbers have changed (AQ-SGD, arXiv 2206.01299), which rounds
    more finely for as many bytes. Both sides remember the numbers of all texts, four bytes each."""


class BackRecipe(CutRecipe):
    """What crosses the second cut; a form alone is short for rows as they are in that form."""

    kind: Literal["narrow", "plain"] = "plain"
    """As at the first cut, the other way round: the cloud encodes, the edge decodes."""
    form: Form = "float32"

    @model_validator(mode="before")
    @classmethod
    def _of_a_form(cls, given: Any) -> Any:
        return {"form": given} if isinstance(given, str) else given


class EdgeRecipe(Recipe):
    """One of several edges, and the texts that are its own."""

    name: str = Field(pattern=r"^[\w-]{1,64}$")
    where: dict[str, list[Any]] = {}
    """Columns and the values this edge's rows have there, beside those of ``data.where``."""


class RoundsRecipe(Recipe):
    """Rounds of training, each ended by averaging the cloud's parts that the edges have trained."""

    count: int = Field(4, gt=0)
    steps: int = Field(25, gt=0)
    """Optimiser steps of an edge in a round."""
    deadline_s: float = Field(60.0, gt=0)
    """So long the first edge that has done a round waits for the others; who is late is left out of it."""
    parts: Literal["averaged", "private"] = "averaged"
    """What becomes of the edges' own parts. ``averaged``: all begin with the code of the first edge, and first and last
    part, head and code are averaged as well; they cross once a round. ``private``: they stay at the edge, each edge has
    a code of its own, and only the cloud's blocks are averaged."""


class SplitTuneRecipe(Recipe):
    """An edge, or several, that hold the texts and a cloud that holds the middle fine-tune one model together."""

    job: Literal["split_tune"] = "split_tune"
    output: str = "results/split-tune"
    """The result directory."""
    seed: int = Field(10, ge=0)
    """Of the head, the order of samples, dropout and rounding."""
    model: str = "builtin:minilm-l6"
    """A hub id, a directory, a GGUF file or a built-in name."""
    split: int = Field(3, ge=0)
    """Blocks that the edge runs ahead of the cloud."""
    second: int | None = Field(None, gt=0)
    """The first block after those that the cloud runs; None for no more blocks."""
    task: TaskRecipe = ClassificationRecipe()
    data: TextsRecipe = TextsRecipe()
    cut: CutRecipe = CutRecipe()
    back: BackRecipe = BackRecipe()
    lora: LoraRecipe | None = None
    """Adapters instead of all weights."""
    learning: Literal["all", "last+middle", "last"] = "all"
    """Which parts learn. With ``last`` no gradient crosses at all, with ``last+middle`` only at the second cut."""
    labels: Literal["edge", "cloud"] = "edge"
    """With ``cloud`` the last part, head and loss are the cloud's and labels are sent there: a round trip for a
    micro-batch instead of two, and a cloud that reads what each text was labelled as and what the model says of it."""
    training: TrainingRecipe = TrainingRecipe(
        lr=1e-4, schedule="linear", warmup_steps=25, weight_decay=0.01, batch_size=16
    )
    epochs: int = Field(2, gt=0)
    """Edges that train together have ``rounds`` instead."""
    checkpoint_every: int = Field(50, gt=0)
    """Steps."""
    depth: int = Field(4, gt=0)
    """Micro-batches that may be on their way at once, where the cloud is elsewhere."""
    network: NetworkRecipe | None = None
    """Slows the link to a cloud elsewhere down to this, for experiments."""
    threads: int = Field(0, ge=0)
    """CPU threads to compute with; 0 for as many as there are cores."""
    device: Device = "auto"
    edges: list[EdgeRecipe] = []
    """Edges that share the cloud's part, as actors on a Ray cluster or each as a device with ``--cloud``."""
    rounds: RoundsRecipe = RoundsRecipe()
    alone: bool = False
    """Train every edge by itself first, for as many steps, to tell what the others' company brings."""
    edge: str | None = None
    """Which of the edges this device is, with ``--cloud``."""
    group: str = Field("edges", pattern=r"^[\w.-]{1,64}$")
    """What the edges' group is called at the cloud, with ``--cloud``; a run from the beginning needs a new name."""
    cloud_placement: Placement = Placement()
    edge_placement: Placement = Placement()

    @property
    def first_rows(self) -> bool:
        """Whether the head reads nothing but the first row of a text, through the model's own pooler."""
        return isinstance(self.task, ClassificationRecipe | RegressionRecipe) and self.task.pooling == "first"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.second is not None and self.second <= self.split:
            raise ValueError(f"split={self.split} and second={self.second}; allowed: split < second")
        task = self.task
        if isinstance(task, SpanRecipe) and task.max_question + task.stride + 4 > self.data.max_length:
            raise ValueError(
                f"data.max_length={self.data.max_length} leaves a text no room beside "
                f"task.max_question={task.max_question} and task.stride={task.stride}; "
                f"allowed: {task.max_question + task.stride + 4} or more"
            )
        if (self.cut.changes or self.back.changes) and not self.edges and self.epochs == 1:
            raise ValueError("epochs=1 visits no text a second time (cut.changes or back.changes); allowed: 2 or more")
        if isinstance(task, ClassificationRecipe) and task.classes is not None:
            sound = all(isinstance(value, str | int | float) for value in task.classes)
            if not sound or len(set(task.classes)) < len(task.classes):
                raise ValueError(f"task.classes={task.classes}; allowed: texts or numbers, each once")
        if self.training.gradient_checkpointing:
            raise ValueError("training.gradient_checkpointing=true; allowed across a cut: false")
        if self.cut.kind == "sft" and self.split == 0:
            raise ValueError("split=0 leaves no block for the published cut (cut.kind=sft); allowed: 1 or more")
        return self

    @model_validator(mode="after")
    def _fits_labels(self) -> Self:
        if self.labels == "edge":
            return self
        if isinstance(self.task, LanguageRecipe):
            raise ValueError("labels=cloud: those of task.kind=language are the text itself; allowed: labels=edge")
        if self.second is not None or self.back != BackRecipe():
            raise ValueError("labels=cloud leaves no second cut; allowed with it: second: null, and no back")
        if self.learning != "all":
            raise ValueError(f"labels=cloud and learning={self.learning} leave the edge nothing to learn; allowed: all")
        if self.edges:
            raise ValueError("labels=cloud is for one edge; allowed with edges: labels=edge")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [edge.name for edge in self.edges]
        if self.edge is not None and self.edge not in names:
            raise ValueError(f"edge={self.edge}; allowed: {', '.join(names) or 'none without edges'}")
        if not self.edges:
            return self
        if len(set(names)) < len(names):
            raise ValueError(f"edges: names {', '.join(names)}; allowed: each once")
        if self.lora is not None:
            raise ValueError("lora: means of the factors are not the mean of their products; allowed with edges: null")
        if self.cut.kind == "sft":
            raise ValueError("edges are at the ends of links; allowed there: cut.kind narrow or plain")
        if isinstance(self.task, ClassificationRecipe) and self.task.classes is None:
            raise ValueError("task.classes: null, and no edge knows all texts; allowed with edges: the classes by name")
        if self.learning == "last" and self.rounds.parts == "private":
            raise ValueError("learning=last and rounds.parts=private leave the edges nothing in common to train")
        return self

    def of(self, name: str) -> SplitTuneRecipe:
        """How one of the edges trains, as if there were no others.

        Raises:
            ValueError: there is no such edge.
        """
        for edge in self.edges:
            if edge.name == name:
                where = {**self.data.where, **edge.where}
                data = self.data.model_copy(update={"where": where})
                return self.model_copy(update={"edges": [], "edge": None, "data": data})
        raise ValueError(f"no edge '{name}'")
