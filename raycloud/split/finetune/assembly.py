"""Both sides of a split fine-tuning: what the edge has of a model, and the cloud's side beside it or over a link."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.data.batches import Batch
from raycloud.errors import ModelError, RecipeError
from raycloud.models.anatomy import base_of
from raycloud.models.segments import Segment
from raycloud.split.finetune.cloud import CloudSide, Packings
from raycloud.split.finetune.code import Code, narrow, plain, published
from raycloud.split.finetune.edge import Cloud, EdgeSide, Learning, LocalCloud
from raycloud.split.finetune.messages import Begin
from raycloud.split.finetune.numbers import Packing
from raycloud.split.finetune.recipe import (
    ClassificationRecipe,
    CutRecipe,
    RegressionRecipe,
    SpanRecipe,
    SplitTuneRecipe,
)
from raycloud.split.finetune.state import Checkpoints
from raycloud.split.finetune.tasks import Classification, Language, Pooling, Regression, Span, Task, TextHead
from raycloud.split.plan import SplitPlan
from raycloud.training.loop import Trainer
from raycloud.training.lora import attach


def plan_of(recipe: SplitTuneRecipe, config: PretrainedConfig) -> SplitPlan:
    """Where a model of this configuration is cut.

    Raises:
        ModelError: it cannot be cut so.
    """
    blocks = int(config.num_hidden_layers)
    plan = SplitPlan(recipe.split, blocks if recipe.second is None else recipe.second).check(blocks)
    if plan.first == plan.second:
        raise ModelError(f"split={plan.first} leaves the cloud none of the model's {blocks} blocks")
    return plan


def task_of(recipe: SplitTuneRecipe, last: Segment, classes: int, pooler: nn.Module | None = None) -> Task:
    """The head and loss that a recipe names.

    Args:
        recipe: of the task.
        last: the model's last part.
        classes: how many there are, for a classification.
        pooler: the model's own, if it has one, for ``pooling: first``.
    """
    task, width = recipe.task, int(last.config.hidden_size)
    if isinstance(task, SpanRecipe):
        return Span(TextHead(width, 2, dropout=0.0, seed=recipe.seed))  # BERT's has none
    if not isinstance(task, ClassificationRecipe | RegressionRecipe):
        return Language(last)
    outputs = classes if isinstance(task, ClassificationRecipe) else 1
    head = TextHead(
        width,
        outputs,
        dropout=task.dropout,
        seed=recipe.seed,
        pooler=pooler if task.pooling == "first" else None,
    )
    kind = Classification if isinstance(task, ClassificationRecipe) else Regression
    return kind(head, task.pooling)


def back_of(task: Task, last: Segment) -> Pooling:
    """What of a text's rows need leave the cloud."""
    commutes = task.pooling == "first" or not last.anatomy.after
    return task.pooling if not len(last.blocks) and commutes else "rows"


@torch.no_grad()
def calibration_rows(first: Segment, batches: Sequence[Batch]) -> Tensor:
    """The rows (n, d) that leave the edge's first part, dropout off."""
    first.eval()
    return torch.cat([first.rows(batch.ids, valid=batch.valid, types=batch.types)[batch.valid] for batch in batches])


def code_of(cut: CutRecipe, first: Segment, batches: Sequence[Batch]) -> Code:
    """The code of the first cut.

    Args:
        cut: its recipe.
        first: the edge's first part; the published cut takes half a block from it.
        batches: to calibrate on.

    Raises:
        ModelError: the model has no such cut.
    """
    match cut.kind:
        case "plain":
            return plain(int(first.config.hidden_size))
        case "sft":
            return published(first, cut.rank)
        case "narrow":
            code = narrow(calibration_rows(first, batches).cpu(), cut.rank, cut.outliers)
            for end in (code.encoder, code.decoder):
                end.requires_grad_(cut.trained)
            return code


@dataclass(frozen=True)
class Ends:
    """What the edge decides for both sides."""

    recipe: SplitTuneRecipe
    plan: SplitPlan
    first: Segment
    last: Segment
    task: Task
    code: Code
    packings: Packings
    back: Pooling
    learning: Learning
    total_steps: int

    def edge(self, cloud: Cloud) -> EdgeSide:
        """The edge's side of a run with a cloud."""
        recipe, decoder = self.recipe, nn.Identity()
        groups: dict[str, nn.Module] = {
            "first": self.first,
            "encoder": self.code.encoder,
            "decoder": decoder,
            "last": self.last,
            "head": self.task.head,
        }
        return EdgeSide(
            self.first,
            self.code.encoder,
            decoder,
            self.last,
            self.task,
            self.packings,
            self.back,
            cloud,
            Trainer(groups, recipe.training, total_steps=self.total_steps, seed=recipe.seed),
            learning=self.learning,
            seed=recipe.seed,
            depth=recipe.depth,
        )

    def begin(self, fingerprint: str, run: str) -> Begin:
        """What a cloud at the other end of a link is asked for.

        Raises:
            RecipeError: the recipe asks for what only one process can do.
        """
        recipe = self.recipe
        alone = {
            "lora": recipe.lora is not None,
            "cut.kind=sft": recipe.cut.kind == "sft",
            # The edge would have to load the model's own pooler, which belongs to no segment.
            "task.pooling=first": self.task.pooling == "first",
        }
        for name, asked in alone.items():
            if asked:
                allowed = "all weights, cut.kind narrow or plain, task.pooling mean"
                raise RecipeError(f"{name}: not over a link; allowed there: {allowed}")
        return Begin(
            fingerprint=fingerprint,
            first=self.plan.first,
            second=self.plan.second,
            run=run,
            seed=recipe.seed,
            total_steps=self.total_steps,
            training=recipe.training,
            cloud=self.learning.cloud,
            back=self.back,
            width=self.code.width,
            apart=self.code.apart,
            narrow=recipe.cut.kind == "narrow",
            trained=recipe.cut.trained,
            up=recipe.cut.form,
            down=recipe.back,
        )


def ends_of(
    recipe: SplitTuneRecipe,
    first: Segment,
    last: Segment,
    calibration: Sequence[Batch],
    *,
    classes: int,
    total_steps: int,
    pooler: nn.Module | None = None,
) -> Ends:
    """Head, code and packings for the edge's parts of a model.

    Args:
        recipe: how.
        first: blocks [0, split) with the embedding.
        last: blocks from the second cut on.
        calibration: what the code of the first cut is fitted to.
        classes: of a classification.
        total_steps: where the learning rate's schedule ends.
        pooler: see :func:`task_of`.

    Raises:
        ModelError: the model cannot be cut so.
    """
    device, width = calibration[0].ids.device, int(first.config.hidden_size)
    plan = plan_of(recipe, first.config)
    task = task_of(recipe, last, classes, pooler)
    code = code_of(recipe.cut, first, calibration)
    for module in (task.head, code.encoder):
        module.to(device)
    learning = Learning(ahead=recipe.learning == "all", cloud=recipe.learning != "last")
    if not learning.ahead:
        first.requires_grad_(False)
    packings = Packings(Packing(recipe.cut.form, code.width, code.apart), Packing(recipe.back, width))
    return Ends(recipe, plan, first, last, task, code, packings, back_of(task, last), learning, total_steps)


def assemble(
    model: PreTrainedModel,
    recipe: SplitTuneRecipe,
    calibration: Sequence[Batch],
    *,
    classes: int = 0,
    total_steps: int,
    kept: Checkpoints | None = None,
) -> EdgeSide:
    """The edge's side, with the cloud's beside it in this process.

    Args:
        model: is cut; its weights are trained in place.
        recipe: how.
        calibration: see :func:`ends_of`.
        classes: of a classification.
        total_steps: where the learning rate's schedule ends.
        kept: the cloud's checkpoints.

    Raises:
        ModelError: the model cannot be cut so.
    """
    plan = plan_of(recipe, model.config)
    pooler: nn.Module | None = getattr(base_of(model), "pooler", None)
    if recipe.lora is not None:
        attach(model, recipe.lora, recipe.seed)
    first, last = Segment(model, 0, plan.first, embed=True, head=False), Segment(model, plan.second, embed=False)
    middle = Segment(model, plan.first, plan.second, embed=False, head=False)
    ends = ends_of(recipe, first, last, calibration, classes=classes, total_steps=total_steps, pooler=pooler)
    if not ends.learning.cloud:
        middle.requires_grad_(False)
    decoder = ends.code.decoder.to(model.device)
    theirs: dict[str, nn.Module] = {"middle": middle, "decoder": decoder}
    learns = any(parameter.requires_grad for module in theirs.values() for parameter in module.parameters())
    cloud = CloudSide(
        middle,
        decoder,
        nn.Identity(),
        ends.packings,
        ends.back,
        Trainer(theirs, recipe.training, total_steps=total_steps, seed=recipe.seed) if learns else None,
        recipe.seed,
    )
    return ends.edge(LocalCloud(cloud, kept=kept))
