"""Both sides of a split fine-tuning, made of one model in one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from raycloud.data.batches import Batch
from raycloud.errors import ModelError
from raycloud.link.meter import Meter
from raycloud.models.anatomy import base_of, blocks_of
from raycloud.models.segments import Segment
from raycloud.split.finetune.cloud import CloudSide, Packings
from raycloud.split.finetune.code import Code, narrow, plain, published
from raycloud.split.finetune.edge import EdgeSide, Learning, LocalCloud
from raycloud.split.finetune.numbers import Packing
from raycloud.split.finetune.recipe import ClassificationRecipe, CutRecipe, RegressionRecipe, SplitTuneRecipe
from raycloud.split.finetune.state import Checkpoints
from raycloud.split.finetune.tasks import Classification, Language, Pooling, Regression, Task, TextHead
from raycloud.split.plan import SplitPlan
from raycloud.training.loop import Trainer
from raycloud.training.lora import attach


def plan_of(recipe: SplitTuneRecipe, model: PreTrainedModel) -> SplitPlan:
    """Where the model is cut.

    Raises:
        ModelError: it cannot be cut so.
    """
    blocks = len(blocks_of(model))
    plan = SplitPlan(recipe.split, blocks if recipe.second is None else recipe.second).check(blocks)
    if plan.first == plan.second:
        raise ModelError(f"split={plan.first} leaves the cloud none of the model's {blocks} blocks")
    return plan


def task_of(recipe: SplitTuneRecipe, model: PreTrainedModel, last: Segment, classes: int) -> Task:
    """The head and loss that a recipe names.

    Args:
        recipe: of the task.
        model: gives the width and, for ``pooling: first``, its own pooler if it has one.
        last: the model's last part.
        classes: how many there are, for a classification.
    """
    task = recipe.task
    if not isinstance(task, ClassificationRecipe | RegressionRecipe):
        return Language(last)
    pooler: nn.Module | None = getattr(base_of(model), "pooler", None) if task.pooling == "first" else None
    outputs = classes if isinstance(task, ClassificationRecipe) else 1
    head = TextHead(model.config.hidden_size, outputs, dropout=task.dropout, seed=recipe.seed, pooler=pooler)
    head.to(model.device)
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
            return narrow(calibration_rows(first, batches).cpu(), cut.rank, cut.outliers)


def assemble(
    model: PreTrainedModel,
    recipe: SplitTuneRecipe,
    calibration: Sequence[Batch],
    *,
    classes: int = 0,
    total_steps: int,
    meter: Meter | None = None,
    kept: Checkpoints | None = None,
) -> EdgeSide:
    """The edge's side, with the cloud's beside it in this process.

    Args:
        model: is cut; its weights are trained in place.
        recipe: how.
        calibration: what the code of the first cut is fitted to.
        classes: of a classification.
        total_steps: where the learning rate's schedule ends.
        meter: counts what would cross.
        kept: the cloud's checkpoints.

    Raises:
        ModelError: the model cannot be cut so.
    """
    plan = plan_of(recipe, model)
    if recipe.lora is not None:
        attach(model, recipe.lora, recipe.seed)
    first, last = Segment(model, 0, plan.first, embed=True, head=False), Segment(model, plan.second, embed=False)
    middle = Segment(model, plan.first, plan.second, embed=False, head=False)
    task = task_of(recipe, model, last, classes)
    code, back = code_of(recipe.cut, first, calibration), plain(model.config.hidden_size)
    learning = Learning(ahead=recipe.learning == "all", cloud=recipe.learning != "last")
    for part, learns in ((first, learning.ahead), (middle, learning.cloud)):
        if not learns:
            part.requires_grad_(False)
    for end in (code.encoder, code.decoder):
        end.to(model.device)
        if recipe.cut.kind == "narrow" and not recipe.cut.trained:
            end.requires_grad_(False)
    packings = Packings(
        Packing(recipe.cut.form, code.width, code.apart), Packing(recipe.back, int(model.config.hidden_size))
    )
    theirs = {"middle": middle, "decoder": code.decoder, "encoder": back.encoder}
    ours = {"first": first, "encoder": code.encoder, "decoder": back.decoder, "last": last, "head": task.head}
    pooling = back_of(task, last)

    def trainer(groups: dict[str, nn.Module]) -> Trainer:
        return Trainer(groups, recipe.training, total_steps=total_steps, seed=recipe.seed)

    learns = any(parameter.requires_grad for module in theirs.values() for parameter in module.parameters())
    cloud = CloudSide(
        middle,
        code.decoder,
        back.encoder,
        packings,
        pooling,
        trainer(theirs) if learns else None,
        recipe.seed,
    )
    return EdgeSide(
        first,
        code.encoder,
        back.decoder,
        last,
        task,
        packings,
        pooling,
        LocalCloud(cloud, meter, kept),
        trainer(ours),
        learning=learning,
        seed=recipe.seed,
        depth=recipe.depth,
    )
