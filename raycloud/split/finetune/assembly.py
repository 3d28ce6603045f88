"""Both sides of a split fine-tuning: what the edge has of a model, and the cloud's side beside it or over a link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.data.batches import Batch
from raycloud.errors import ModelError, RecipeError
from raycloud.models.anatomy import pooler_of
from raycloud.models.segments import Segment
from raycloud.split.finetune.cloud import CloudSide
from raycloud.split.finetune.code import Code, blank, check_sizes, narrow, plain, published
from raycloud.split.finetune.crossing import check_frames
from raycloud.split.finetune.edge import EdgeSide, LocalCloud
from raycloud.split.finetune.front import Cloud, Front, Learning
from raycloud.split.finetune.labelled import LabelledCloud, LabelledEdge
from raycloud.split.finetune.messages import Agreed, Begin
from raycloud.split.finetune.numbers import Packing, Packings
from raycloud.split.finetune.recipe import (
    BackRecipe,
    ClassificationRecipe,
    CutRecipe,
    RegressionRecipe,
    SpanRecipe,
    SplitTuneRecipe,
)
from raycloud.split.finetune.state import Checkpoints
from raycloud.split.finetune.tasks import Language, Pooling, Task, TaskTerms
from raycloud.split.plan import SplitPlan
from raycloud.training.loop import Trainer
from raycloud.training.lora import adapt


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


def check_lengths(recipe: SplitTuneRecipe, config: PretrainedConfig) -> None:
    """Whether a model of this configuration takes texts as long as a recipe allows.

    Raises:
        RecipeError: it does not.
    """
    longest = int(config.max_position_embeddings)
    if recipe.data.max_length > longest:
        raise RecipeError(f"data.max_length={recipe.data.max_length}; allowed: up to the model's {longest} positions")


def terms_of(recipe: SplitTuneRecipe, classes: int) -> TaskTerms | None:
    """The head of a recipe's task; None if the model's own is one.

    Args:
        recipe: of the task.
        classes: how many there are, for a classification.
    """
    match recipe.task:
        case ClassificationRecipe() as task:
            return TaskTerms(kind=task.kind, outputs=classes, pooling=task.pooling, dropout=task.dropout)
        case RegressionRecipe() as task:
            return TaskTerms(kind=task.kind, outputs=1, pooling=task.pooling, dropout=task.dropout)
        case SpanRecipe() as task:
            return TaskTerms(kind=task.kind, outputs=2, pooling="rows", dropout=0.0)  # BERT's has none
        case _:
            return None


def task_of(recipe: SplitTuneRecipe, last: Segment, classes: int, pooler: nn.Module | None = None) -> Task:
    """The head and loss that a recipe names.

    Args:
        recipe: of the task.
        last: the model's last part.
        classes: how many there are, for a classification.
        pooler: the model's own, if it has one, for ``pooling: first``.
    """
    terms = terms_of(recipe, classes)
    return Language(last) if terms is None else terms.task(int(last.config.hidden_size), recipe.seed, pooler)


def learning_of(recipe: SplitTuneRecipe) -> Learning:
    """Which parts learn."""
    return Learning(ahead=recipe.learning == "all", cloud=recipe.learning != "last")


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
            rows = calibration_rows(first, batches).cpu()
            return narrow(rows, cut.rank, cut.outliers, even=cut.form == "int4")


def code_back(back: BackRecipe, width: int) -> Code:
    """The code of the second cut for rows of ``width`` numbers; a narrow one is still to be fitted by the cloud.

    Raises:
        ModelError: rows have no such code.
    """
    if back.kind == "plain":
        return plain(width)
    check_sizes(width, back.rank, back.outliers)
    return blank(width, back.outliers + back.rank, back.outliers)


@dataclass(frozen=True)
class Ends:
    """What the edge decides for both sides."""

    recipe: SplitTuneRecipe
    plan: SplitPlan
    first: Segment
    last: Segment
    task: Task
    code: Code
    """Of the first cut."""
    code_back: Code
    """Of the second one."""
    packings: Packings
    back: Pooling
    learning: Learning
    total_steps: int
    terms: TaskTerms | None = None
    """Of the head, where it is the cloud's and labels are sent there."""

    def edge(self, cloud: Cloud, depth: int = 1) -> Front:
        """The edge's side of a run with a cloud; so many micro-batches may be on their way to it at once."""
        recipe, decoder = self.recipe, self.code_back.decoder
        if self.terms is not None:
            return LabelledEdge(
                self.first,
                self.code.encoder,
                self.terms,
                self.packings,
                cloud,
                self._trainer({"first": self.first, "encoder": self.code.encoder}),
                seed=recipe.seed,
                depth=depth,
            )
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
            self._trainer(groups),
            learning=self.learning,
            seed=recipe.seed,
            depth=depth,
        )

    def _trainer(self, groups: Mapping[str, nn.Module]) -> Trainer:
        lr = code_rates(self.recipe, first="encoder", second="decoder")
        return Trainer(groups, self.recipe.training, total_steps=self.total_steps, seed=self.recipe.seed, lr=lr)

    def check_frames(self, tokens: int, fitted_to: Sequence[Batch]) -> None:
        """Whether a batch of so many tokens fits the frames of a link, and those that codes are fitted to.

        Raises:
            RecipeError: it does not.
        """
        cross = fitted_to if self.recipe.back.kind == "narrow" else ()
        fitted = max((int(batch.valid.sum()) for batch in cross), default=0)
        check_frames(tokens, self.packings, self.back if self.terms is None else "mean", fitted)

    def begin(self, fingerprint: str, run: str) -> Begin:
        """What a cloud at the other end of a link is asked for.

        Raises:
            RecipeError: the recipe asks for what only one process can do.
        """
        recipe = self.recipe
        if recipe.cut.kind == "sft":
            raise RecipeError("cut.kind=sft: not over a link; allowed there: narrow or plain")
        return Begin(
            fingerprint=fingerprint,
            first=self.plan.first,
            second=self.plan.second,
            run=run,
            seed=recipe.seed,
            total_steps=self.total_steps,
            training=recipe.training,
            lora=recipe.lora,
            cloud=self.learning.cloud,
            back=self.back,
            up=_agreed(recipe, recipe.cut, self.code),
            down=_agreed(recipe, recipe.back, self.code_back),
            task=self.terms,
        )


def code_rate(recipe: SplitTuneRecipe, cut: CutRecipe) -> float | None:
    """The peak learning rate of a cut's code; None for the recipe's."""
    return 0.1 * recipe.training.lr if cut.lr is None and recipe.lora is not None else cut.lr


def code_rates(recipe: SplitTuneRecipe, *, first: str, second: str) -> dict[str, float]:
    """Those of one side's ends of both codes, by their names there."""
    rates = {first: code_rate(recipe, recipe.cut), second: code_rate(recipe, recipe.back)}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _agreed(recipe: SplitTuneRecipe, cut: CutRecipe, code: Code) -> Agreed:
    return Agreed(
        form=cut.form,
        width=code.width,
        apart=code.apart,
        narrow=cut.kind == "narrow",
        trained=cut.trained,
        lr=code_rate(recipe, cut),
        changes=cut.changes,
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
    """Head, codes and packings for the edge's parts of a model.

    Args:
        recipe: how.
        first: blocks [0, split) with the embedding.
        last: blocks from the second cut on.
        calibration: what the code of the first cut is fitted to; that of the second one, once a cloud is there, by
            :meth:`~raycloud.split.finetune.edge.EdgeSide.fit`.
        classes: of a classification.
        total_steps: where the learning rate's schedule ends.
        pooler: see :func:`task_of`.

    Raises:
        ModelError: the model cannot be cut so.
        RecipeError: the edge would have nothing to learn.
    """
    device, width = calibration[0].ids.device, int(first.config.hidden_size)
    plan = plan_of(recipe, first.config)
    if recipe.lora is not None:
        for segment in (first, last):
            adapt(segment, recipe.lora, recipe.seed)
    task = task_of(recipe, last, classes, pooler)
    code, back = code_of(recipe.cut, first, calibration), code_back(recipe.back, width)
    for module in (task.head, code.encoder, back.decoder):
        module.to(device)
    learning, labels_cross = learning_of(recipe), recipe.labels == "cloud"
    if not learning.ahead:
        first.requires_grad_(False)
    # Each end of a code learns with the side that holds it.
    holders = (
        (code.encoder, recipe.cut, learning.ahead),
        (code.decoder, recipe.cut, learning.cloud),
        (back.encoder, recipe.back, learning.cloud),
        (back.decoder, recipe.back, True),
    )
    for end, cut, learns in holders:
        if not learns or (cut.kind == "narrow" and not cut.trained):
            end.requires_grad_(False)
    # Adapters of no block and a code that is fixed leave nothing to send a gradient back for.
    learning = replace(learning, ahead=_learns(first, code.encoder))
    if not learning.ahead and (labels_cross or not _learns(back.decoder, last, task.head)):
        raise RecipeError(
            f"split={recipe.split}, learning={recipe.learning} and labels={recipe.labels} leave the edge nothing to "
            "learn; allowed: more blocks at the edge, or a narrow cut that is trained"
        )
    packings = Packings(
        Packing(recipe.cut.form, code.width, code.apart, recipe.cut.changes),
        Packing(recipe.back.form, back.width, back.apart, recipe.back.changes),
    )
    return Ends(
        recipe,
        plan,
        first,
        last,
        task,
        code,
        back,
        packings,
        back_of(task, last),
        learning,
        total_steps,
        terms_of(recipe, classes) if labels_cross else None,
    )


def _learns(*modules: nn.Module) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters())


def assemble(
    model: PreTrainedModel,
    recipe: SplitTuneRecipe,
    calibration: Sequence[Batch],
    *,
    classes: int = 0,
    total_steps: int,
    kept: Checkpoints | None = None,
) -> Front:
    """The edge's side, with the cloud's beside it in this process.

    Args:
        model: is cut; its weights are trained in place.
        recipe: how.
        calibration: what the codes are fitted to.
        classes: of a classification.
        total_steps: where the learning rate's schedule ends.
        kept: the cloud's checkpoints.

    Raises:
        ModelError: the model cannot be cut so.
    """
    plan = plan_of(recipe, model.config)
    pooler = pooler_of(model)
    first, last = Segment(model, 0, plan.first, embed=True, head=False), Segment(model, plan.second, embed=False)
    middle = Segment(model, plan.first, plan.second, embed=False, head=False)
    if recipe.lora is not None:
        adapt(middle, recipe.lora, recipe.seed)
    ends = ends_of(recipe, first, last, calibration, classes=classes, total_steps=total_steps, pooler=pooler)
    if not ends.learning.cloud:
        middle.requires_grad_(False)
    decoder, encoder = ends.code.decoder.to(model.device), ends.code_back.encoder.to(model.device)
    if ends.terms is None:
        cloud = CloudSide(middle, decoder, encoder, ends.packings, ends.back, None, recipe.seed)
    else:
        cloud = LabelledCloud(middle, decoder, last, ends.terms, ends.task, ends.packings, ends.back, None, recipe.seed)
    if _learns(*cloud.modules.values()):
        lr = code_rates(recipe, first="decoder", second="encoder")
        cloud.trainer = Trainer(cloud.modules, recipe.training, total_steps=total_steps, seed=recipe.seed, lr=lr)
    edge = ends.edge(LocalCloud(cloud, kept=kept))
    edge.fit(calibration)
    return edge
