"""Recipe of split fine-tuning."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from raycloud.data.prompts import Format
from raycloud.data.recipe import check_validation
from raycloud.evaluation.classification import Metric
from raycloud.models.devices import Device
from raycloud.models.texts import Bos
from raycloud.recipe import Bundle, Placement, Recipe
from raycloud.rounds.recipe import AggregatorName, KeptVersions
from raycloud.split.finetune.wire_dtype import WireDType
from raycloud.split.recipe import NetworkRecipe
from raycloud.training.recipe import LoraRecipe, TrainingRecipe

Column = Annotated[str, Field(min_length=1)]


class TaskDataRecipe(Recipe):
    """Data of a task: texts with labels."""

    renamed: ClassVar[dict[str, str]] = {"held_out": "held_out_samples"}

    source: str = "builtin:reviews"
    """``builtin:reviews``, a JSONL or Parquet file, or a hub id, with its configuration as in ``nyu-mll/glue:cola``."""
    validation: str | None = None
    """Source whose rows are all held out; then nothing is held out of ``source``."""
    where: dict[str, list[Any]] = {}
    """Filter: only rows whose columns hold one of these values."""
    max_length: int = Field(128, gt=1)
    """Largest number of tokens of a text."""
    bos: Bos = "auto"
    """BOS at the beginning of texts: ``auto`` as the tokenizer or the chat template has it, ``true`` or ``false``. Only
    for ``task.kind: language``: for labelled texts and questions the tokenizer decides."""
    limit: int | None = Field(None, gt=0)
    """Number of rows of the training split to use, evenly spread over it; None for all."""
    held_out_samples: int | None = Field(None, gt=0)
    """Number of rows of the held-out split to use; None for all."""
    held_out_split: str = Field("test", min_length=1)
    """Name of the held-out split: ``test``, ``valid``, or one of a hub data set, such as ``validation_matched``."""

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        check_validation(self.source, self.validation)
        return self


class ClassificationRecipe(Recipe):
    """Task of predicting one of several classes for a text or a pair of texts."""

    kind: Literal["classification"] = "classification"
    text: Column = "text"
    """Column of the text."""
    pair: Column | None = None
    """Column of a second text."""
    label: Column = "label"
    classes: list[Any] | None = Field(None, min_length=2)
    """Values of the label, in the order of the classes; rows with other values are left out. None for all, sorted."""
    pooling: Literal["mean", "first"] = "mean"
    """Input of the head: the mean of a text's hidden states, or the first one, through the model's own pooler."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout rate before the classifier."""
    metrics: list[Metric] = Field(["accuracy"], min_length=1)


class RegressionRecipe(Recipe):
    """Task of predicting one number for a text or a pair of texts."""

    kind: Literal["regression"] = "regression"
    text: Column = "text"
    pair: Column | None = None
    label: Column = "score"
    pooling: Literal["mean", "first"] = "mean"
    dropout: float = Field(0.1, ge=0, lt=1)
    metrics: list[Metric] = Field(["pearson", "spearman"], min_length=1)


class LanguageRecipe(Recipe):
    """Task of predicting the next token of a response."""

    renamed: ClassVar[dict[str, str]] = {"max_prompt": "max_prompt_length"}

    kind: Literal["language"] = "language"
    format: Format = "alpaca"
    max_prompt_length: int = Field(112, gt=0)


class SpanRecipe(Recipe):
    """Task of finding the answer to a question in a text, as in SQuAD; long texts become overlapping windows."""

    kind: Literal["span"] = "span"
    question: Column = "question"
    context: Column = "context"
    """Column of the text."""
    answers: Column = "answers"
    """Column of the answers, a map of ``text`` and ``answer_start``."""
    max_question: int = Field(64, gt=0)
    """Largest number of tokens of a question."""
    stride: int = Field(128, ge=0)
    """Number of tokens that two windows share."""
    max_answer: int = Field(30, gt=0)
    """Largest number of tokens of an answer."""


TaskRecipe = Annotated[
    ClassificationRecipe | RegressionRecipe | SpanRecipe | LanguageRecipe, Field(discriminator="kind")
]


class UplinkRecipe(Recipe):
    """Uplink: the bottleneck and wire format of the first cut."""

    renamed: ClassVar[dict[str, str]] = {"form": "dtype", "outliers": "num_outliers", "changes": "activation_delta"}

    kind: Literal["low_rank", "plain", "sft"] = "low_rank"
    """Kind of cut: ``low_rank`` keeps the residual stream and trains its maps; ``plain`` sends hidden states unchanged;
    ``sft`` is the published cut inside the last block of the edge's first part, which drops the residual."""
    rank: int = Field(32, gt=0)
    """Coefficients sent per token, beside ``num_outliers``; without effect for ``plain``."""
    num_outliers: int = Field(0, ge=0)
    """Number of coordinates sent unchanged in addition; ``low_rank`` only. Decoders need a few: their hidden state at
    the first token is a hundred times larger than all others."""
    trained: bool = True
    """True to train each map of ``low_rank`` with the side that holds it."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate of these maps; None for ``training.lr``, or a tenth of it with ``lora``, since the rate of
    adapters is too high for whole matrices."""
    dtype: WireDType = "int8"
    """Wire dtype of the numbers and of their gradients."""
    activation_delta: bool = False
    """True to send only activation deltas from a text's second visit on (AQ-SGD, arXiv 2206.01299), which rounds more
    finely for as many bytes. Both sides keep the numbers of all texts in memory, four bytes each."""


class DownlinkRecipe(UplinkRecipe):
    """Downlink: bottleneck and wire format of the second cut. A wire dtype alone means ``kind: plain`` in it."""

    kind: Literal["low_rank", "plain"] = "plain"
    """Kind of cut, as at the first one; here the cloud encodes and the edge decodes."""
    dtype: WireDType = "float32"

    @model_validator(mode="before")
    @classmethod
    def _of_a_dtype(cls, given: Any) -> Any:
        return {"dtype": given} if isinstance(given, str) else given


class SplitTuneEdgeRecipe(Recipe):
    """Edge of several, with its own texts."""

    name: str = Field(pattern=r"^[\w-]{1,64}$")
    where: dict[str, list[Any]] = {}
    """Filter of this edge's rows by columns and values, in addition to ``data.where``."""
    device: bool = False
    """True for a device without Ray, which takes part by ``raycloud edge learn`` and brings its own data. It takes no
    resources of the cluster."""


class SplitTuneRoundsRecipe(Recipe):
    """Rounds of training; at the end of each, the parts trained by the edges are averaged."""

    count: int = Field(4, gt=0)
    steps: int = Field(25, gt=0)
    """Number of optimiser steps of an edge in a round."""
    aggregation: AggregatorName = "mean"
    """``mean`` weights edges by their samples. ``trimmed_mean`` drops the lowest and highest fifth of each number, from
    five edges on, and ``median`` takes the middle; both resist a few wrong edges and do not count samples."""
    deadline_s: float = Field(60.0, gt=0)
    """Seconds that the first edge to finish a round waits for the others; late edges are left out of it."""
    keep_versions: KeptVersions | None = None
    """Number of newest versions that ``versions/`` keeps; None for all."""
    parts: Literal["averaged", "private"] = "averaged"
    """Handling of the edges' own parts. ``averaged``: all begin with the bottleneck of the first edge, and first and
    last part, head and bottleneck are averaged as well, sent once per round. ``private``: they stay at the edge, each
    edge has its own bottleneck, and only the cloud's blocks are averaged."""


class SplitTuneRecipe(Recipe):
    """Recipe of split fine-tuning: edges with the texts and a cloud with the middle train one model together."""

    renamed: ClassVar[dict[str, str]] = {
        "split": "start_block",
        "second": "end_block",
        "cut": "uplink",
        "back": "downlink",
        "learning": "trainable",
        "depth": "max_in_flight",
    }

    job: Literal["split_tune"] = "split_tune"
    output: str = "results/split-tune"
    """Result directory."""
    seed: int = Field(10, ge=0)
    """Seed of the head, the order of samples, dropout and rounding."""
    model: str = "builtin:minilm-l6"
    """Hub id, directory, GGUF file or built-in name."""
    start_block: int = Field(3, ge=0)
    """Number of blocks that the edge runs before the cloud."""
    end_block: int | None = Field(None, gt=0)
    """First block after those that the cloud runs; None if the cloud runs all remaining blocks."""
    task: TaskRecipe = ClassificationRecipe()
    data: TaskDataRecipe = TaskDataRecipe()
    uplink: UplinkRecipe = UplinkRecipe()
    downlink: DownlinkRecipe = DownlinkRecipe()
    lora: LoraRecipe | None = None
    """LoRA adapters to train instead of all weights."""
    trainable: Literal["all", "last+middle", "last"] = "all"
    """Parts to train. With ``last`` no gradient is sent at all, with ``last+middle`` only at the second cut."""
    labels: Literal["edge", "cloud"] = "edge"
    """Side that has the labels. With ``cloud`` the last part, head and loss are the cloud's and labels are sent there:
    one round trip per micro-batch instead of two, but the cloud reads each text's label and the model's outputs."""
    training: TrainingRecipe = TrainingRecipe(
        lr=1e-4, schedule="linear", warmup_steps=25, weight_decay=0.01, batch_size=16
    )
    epochs: int = Field(2, gt=0)
    """Number of epochs; edges that train together use ``rounds`` instead."""
    checkpoint_every: int = Field(50, gt=0)
    """Number of steps between checkpoints."""
    max_in_flight: int = Field(4, gt=0)
    """Largest number of micro-batches in flight, with a cloud over a link."""
    network: NetworkRecipe | None = None
    """Emulated network on the link to the cloud, for experiments; None for the link's own speed."""
    threads: int = Field(0, ge=0)
    """Number of CPU threads; 0 for one per core."""
    device: Device = "auto"
    edges: list[SplitTuneEdgeRecipe] = []
    """Edges that share the cloud's part, as actors on a Ray cluster or each as a device with ``--cloud``."""
    rounds: SplitTuneRoundsRecipe = SplitTuneRoundsRecipe()
    alone: bool = False
    """True to train every edge alone first, for as many steps, to measure the gain of training together."""
    edge: str | None = None
    """Name of this device's edge, with ``--cloud``."""
    group: str = Field("edges", pattern=r"^[\w.-]{1,64}$")
    """Name of the edges' group at the cloud, with ``--cloud``; a run from the beginning needs a new name."""
    cloud_placement: Placement = Placement()
    edge_placement: Placement = Placement()

    @property
    def devices(self) -> list[SplitTuneEdgeRecipe]:
        """Edges that are devices without Ray."""
        return [edge for edge in self.edges if edge.device]

    def for_device(self) -> SplitTuneRecipe:
        """Recipe as a device gets it: with the names of the other edges, and without what their rows are."""
        edges = [edge.model_copy(update={"where": {}}) for edge in self.edges]
        data = self.data.model_copy(update={"validation": None})
        return self.model_copy(update={"edges": edges, "data": data})

    @property
    def uses_pooler(self) -> bool:
        """Return whether the head uses only the first hidden state of a text, through the model's own pooler."""
        return isinstance(self.task, ClassificationRecipe | RegressionRecipe) and self.task.pooling == "first"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.end_block is not None and self.end_block <= self.start_block:
            raise ValueError(
                f"start_block={self.start_block} and end_block={self.end_block}; allowed: start_block < end_block"
            )
        task = self.task
        if isinstance(task, SpanRecipe) and task.max_question + task.stride + 4 > self.data.max_length:
            raise ValueError(
                f"data.max_length={self.data.max_length} leaves a text no room beside "
                f"task.max_question={task.max_question} and task.stride={task.stride}; "
                f"allowed: {task.max_question + task.stride + 4} or more"
            )
        if (self.uplink.activation_delta or self.downlink.activation_delta) and not self.edges and self.epochs == 1:
            raise ValueError(
                "epochs=1 visits no text a second time (uplink.activation_delta or downlink.activation_delta); "
                "allowed: 2 or more"
            )
        if isinstance(task, ClassificationRecipe) and task.classes is not None:
            sound = all(isinstance(value, str | int | float) for value in task.classes)
            if not sound or len(set(task.classes)) < len(task.classes):
                raise ValueError(f"task.classes={task.classes}; allowed: texts or numbers, each once")
        if self.data.bos != "auto" and not isinstance(task, LanguageRecipe):
            raise ValueError(
                f"data.bos={str(self.data.bos).lower()} has no effect on task.kind={task.kind}, whose texts the "
                "tokenizer begins itself; allowed: auto"
            )
        if self.training.gradient_checkpointing:
            raise ValueError("training.gradient_checkpointing=true; allowed across a cut: false")
        if self.uplink.kind == "sft" and self.start_block == 0:
            raise ValueError(
                "start_block=0 leaves no block for the published cut (uplink.kind=sft); allowed: 1 or more"
            )
        return self

    @model_validator(mode="after")
    def _fits_labels(self) -> Self:
        if self.labels == "edge":
            return self
        if isinstance(self.task, LanguageRecipe):
            raise ValueError("labels=cloud: those of task.kind=language are the text itself; allowed: labels=edge")
        if self.end_block is not None or self.downlink != DownlinkRecipe():
            raise ValueError("labels=cloud leaves no second cut; allowed with it: end_block: null, and no downlink")
        if self.trainable != "all":
            raise ValueError(
                f"labels=cloud and trainable={self.trainable} leave the edge nothing to train; allowed: all"
            )
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
        for edge in self.devices:
            if edge.where:
                raise ValueError(f"edges: the device '{edge.name}' brings its data; allowed: no where")
            if self.uses_pooler:
                raise ValueError(
                    f"task.pooling=first, and the device '{edge.name}' gets no pooler; allowed with devices: mean"
                )
        if self.uplink.kind == "sft":
            raise ValueError("edges are at the ends of links; allowed there: uplink.kind low_rank or plain")
        if isinstance(self.task, ClassificationRecipe) and self.task.classes is None:
            raise ValueError("task.classes: null, and no edge knows all texts; allowed with edges: the classes by name")
        if self.trainable == "last" and self.rounds.parts == "private":
            raise ValueError("trainable=last and rounds.parts=private leave the edges nothing in common to train")
        return self

    def of(self, name: str) -> SplitTuneRecipe:
        """Recipe of one of the edges, as if there were no others.

        Raises:
            ValueError: there is no such edge.
        """
        for edge in self.edges:
            if edge.name == name:
                where = {**self.data.where, **edge.where}
                data = self.data.model_copy(update={"where": where})
                return self.model_copy(update={"edges": [], "edge": None, "data": data})
        raise ValueError(f"no edge '{name}'")


def bundles(recipe: SplitTuneRecipe) -> list[Bundle]:
    """Return the resources of the cloud part, then of each edge that is no device.

    Empty without ``edges``: one edge trains in the driver's process or over a link, so no actor is needed.
    """
    edges = [recipe.edge_placement.bundle("edge")] * (len(recipe.edges) - len(recipe.devices))
    return [recipe.cloud_placement.bundle("cloud"), *edges] if recipe.edges else []
