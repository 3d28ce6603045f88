"""Assembly of the edge's side of split fine-tuning: parts, head and bottlenecks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from raycloud.data.batches import Batch
from raycloud.data.checks import check_positions
from raycloud.errors import ModelError, RecipeError
from raycloud.models.segments import Segment
from raycloud.split.finetune.bottleneck import (
    Bottleneck,
    check_sizes,
    empty_bottleneck,
    fit_low_rank,
    identity_bottleneck,
    sft_bottleneck,
)
from raycloud.split.finetune.checkpoints import trainable_parameters
from raycloud.split.finetune.client import CloudClient
from raycloud.split.finetune.edge import UShapedEdge
from raycloud.split.finetune.edge_trainer import EdgeTrainer, TrainableParts
from raycloud.split.finetune.label_sharing import LabelSharingEdge
from raycloud.split.finetune.messages import CutConfig, OpenTuning, TuneConfig, TuneGrant
from raycloud.split.finetune.recipe import (
    ClassificationRecipe,
    DownlinkRecipe,
    LanguageRecipe,
    RegressionRecipe,
    SpanRecipe,
    SplitTuneRecipe,
    UplinkRecipe,
)
from raycloud.split.finetune.tasks import HeadConfig, LanguageModelling, Pooling, Task
from raycloud.split.finetune.traffic import check_batch_size
from raycloud.split.plan import SplitPlan
from raycloud.training.lora import add_segment_adapters


def plan_of(recipe: SplitTuneRecipe, config: PretrainedConfig) -> SplitPlan:
    """Plan by which a model of this configuration is cut.

    Raises:
        ModelError: the model cannot be cut so.
    """
    blocks = int(config.num_hidden_layers)
    plan = SplitPlan(recipe.start_block, blocks if recipe.end_block is None else recipe.end_block).check(blocks)
    if plan.start_block == plan.end_block:
        raise ModelError(f"start_block={plan.start_block} leaves the cloud none of the model's {blocks} blocks")
    return plan


def check_lengths(recipe: SplitTuneRecipe, config: PretrainedConfig) -> None:
    """Check that a model of this configuration accepts texts as long as the recipe allows.

    Raises:
        RecipeError: the model has fewer positions.
    """
    check_positions("data.max_length", recipe.data.max_length, config)


def head_config(recipe: SplitTuneRecipe, classes: int) -> HeadConfig | None:
    """Configuration of the head of a recipe's task; None if the model's own head is used.

    Args:
        recipe: recipe with the task.
        classes: number of classes, for a classification.
    """
    match recipe.task:
        case ClassificationRecipe() as task:
            return HeadConfig(kind=task.kind, outputs=classes, pooling=task.pooling, dropout=task.dropout)
        case RegressionRecipe() as task:
            return HeadConfig(kind=task.kind, outputs=1, pooling=task.pooling, dropout=task.dropout)
        case SpanRecipe() as task:
            return HeadConfig(kind=task.kind, outputs=2, pooling="none", dropout=0.0)  # BERT's head has no dropout
        case LanguageRecipe():
            return None


def task_of(recipe: SplitTuneRecipe, last: Segment, classes: int, pooler: nn.Module | None = None) -> Task:
    """Task of a recipe: its head and loss.

    Args:
        recipe: recipe with the task.
        last: the model's last part.
        classes: number of classes, for a classification.
        pooler: the model's own pooler, if it has one, for ``pooling: first``.
    """
    head = head_config(recipe, classes)
    return LanguageModelling(last) if head is None else head.task(int(last.config.hidden_size), recipe.seed, pooler)


def trainable_parts(recipe: SplitTuneRecipe) -> TrainableParts:
    """Parts of the model that a recipe trains."""
    return TrainableParts(first_part=recipe.trainable == "all", cloud=recipe.trainable != "last")


def downlink_pooling(pooling: Pooling, last: Segment) -> Pooling:
    """Pooling of a text's hidden states before they leave the cloud, for a head with this pooling."""
    commutes = pooling == "first" or not last.has_norm
    return pooling if not len(last.blocks) and commutes else "none"


@torch.no_grad()
def calibration_hidden(first: Segment, batches: Sequence[Batch]) -> Tensor:
    """Hidden states (n, d) after the edge's first part for calibration texts, without dropout."""
    first.eval()
    return torch.cat([first.hidden(batch.ids, valid=batch.valid, types=batch.types)[batch.valid] for batch in batches])


def fit_uplink(cut: UplinkRecipe, first: Segment, batches: Sequence[Batch]) -> Bottleneck:
    """Bottleneck of the first cut.

    Args:
        cut: recipe of the cut.
        first: the edge's first part; the published cut removes half a block from it.
        batches: calibration texts.

    Raises:
        ModelError: the model has no such cut.
    """
    match cut.kind:
        case "plain":
            return identity_bottleneck(int(first.config.hidden_size))
        case "sft":
            return sft_bottleneck(first, cut.rank)
        case "low_rank":
            hidden = calibration_hidden(first, batches).cpu()
            return fit_low_rank(hidden, cut.rank, cut.num_outliers, rotate=cut.dtype == "int4")


def new_downlink(downlink: DownlinkRecipe, width: int) -> Bottleneck:
    """Bottleneck of the second cut for hidden states of ``width`` numbers; a low-rank one is later fitted by the cloud.

    Raises:
        ModelError: rank or outliers do not fit the width.
    """
    if downlink.kind == "plain":
        return identity_bottleneck(width)
    check_sizes(width, downlink.rank, downlink.num_outliers)
    return empty_bottleneck(width, downlink.num_outliers + downlink.rank, downlink.num_outliers)


@dataclass(frozen=True)
class EdgeSetup:
    """Setup of a run, decided by the edge for both sides."""

    recipe: SplitTuneRecipe
    plan: SplitPlan
    config: TuneConfig
    first: Segment
    last: Segment
    task: Task | None
    """Head and loss; None if they are the cloud's."""
    uplink_bottleneck: Bottleneck
    """Bottleneck of the first cut."""
    downlink_bottleneck: Bottleneck
    """Bottleneck of the second cut."""

    def edge(self, cloud: CloudClient, max_in_flight: int = 1) -> EdgeTrainer:
        """Edge trainer of a run with a cloud; up to ``max_in_flight`` micro-batches may be in flight."""
        first, encoder = self.first, self.uplink_bottleneck.encoder
        if self.task is None:
            return LabelSharingEdge(first, encoder, self.config, cloud, max_in_flight)
        decoder = self.downlink_bottleneck.decoder
        return UShapedEdge(first, encoder, decoder, self.last, self.task, self.config, cloud, max_in_flight)

    def check_batch_size(self, tokens: int, fitted_to: Sequence[Batch], granted: TuneGrant | None = None) -> None:
        """Check that a cloud accepts a batch of ``tokens`` tokens and the calibration batches.

        Args:
            tokens: tokens of the largest batch, without padding.
            fitted_to: calibration batches.
            granted: grant of the cloud; None before it is known, for the default limits.

        Raises:
            RecipeError: a batch takes more bytes than a message may have, or more tokens than the cloud takes.
        """
        config = self.config
        cross = fitted_to if config.downlink.low_rank else ()
        fitted = max((int(batch.valid.sum()) for batch in cross), default=0)
        pooling = config.pooling if config.head is None else "mean"
        if granted is None:
            check_batch_size(tokens, config.wire_formats, pooling, fitted)
            return
        check_batch_size(tokens, config.wire_formats, pooling, fitted, message_bytes=granted.message_bytes)
        if max(tokens, fitted) > granted.tokens:
            raise RecipeError(
                f"training.batch_size: {max(tokens, fitted):,} tokens in a batch; this cloud takes {granted.tokens:,}, "
                "padding included; allowed: fewer texts at once, with more training.gradient_accumulation_steps"
            )

    def begin(self, fingerprint: str, run: str) -> OpenTuning:
        """OPEN message for a cloud at the other end of a link.

        Raises:
            RecipeError: the recipe needs both sides in one process.
        """
        if self.recipe.uplink.kind == "sft":
            raise RecipeError("uplink.kind=sft: not over a link; allowed there: low_rank or plain")
        return OpenTuning(
            fingerprint=fingerprint,
            start_block=self.plan.start_block,
            end_block=self.plan.end_block,
            run=run,
            **dict(self.config),
        )


def bottleneck_lr(recipe: SplitTuneRecipe, cut: UplinkRecipe) -> float | None:
    """Peak learning rate of a cut's bottleneck; None for the recipe's rate."""
    return 0.1 * recipe.training.lr if cut.lr is None and recipe.lora is not None else cut.lr


def _cut_config(recipe: SplitTuneRecipe, cut: UplinkRecipe, bottleneck: Bottleneck) -> CutConfig:
    return CutConfig(
        dtype=cut.dtype,
        width=bottleneck.width,
        num_outliers=bottleneck.num_outliers,
        low_rank=cut.kind == "low_rank",
        trained=cut.trained or cut.kind == "sft",
        lr=bottleneck_lr(recipe, cut),
        activation_delta=cut.activation_delta,
    )


def build_edge_setup(
    recipe: SplitTuneRecipe,
    first: Segment,
    last: Segment,
    calibration: Sequence[Batch],
    *,
    classes: int,
    total_steps: int,
    pooler: nn.Module | None = None,
) -> EdgeSetup:
    """Build head, bottlenecks and wire formats for the edge's parts of a model.

    Args:
        recipe: recipe of the run.
        first: blocks [0, start_block) with the embedding.
        last: blocks from the second cut on.
        calibration: calibration texts for the bottleneck of the first cut; that of the second cut is fitted later, by
            :meth:`~raycloud.split.finetune.edge.UShapedEdge.fit`.
        classes: number of classes, for a classification.
        total_steps: step at which the learning rate's schedule ends.
        pooler: see :func:`task_of`.

    Raises:
        ModelError: the model cannot be cut so.
        RecipeError: the edge would have nothing to train.
    """
    device, width = calibration[0].ids.device, int(first.config.hidden_size)
    plan, head, labels_cross = plan_of(recipe, first.config), head_config(recipe, classes), recipe.labels == "cloud"
    for segment in (first,) if labels_cross else (first, last):
        segment.freeze_shared()
        if recipe.lora is not None:
            add_segment_adapters(segment, recipe.lora, recipe.seed)
    task = None if labels_cross else task_of(recipe, last, classes, pooler)
    uplink, downlink = fit_uplink(recipe.uplink, first, calibration), new_downlink(recipe.downlink, width)
    modules = {"first": first, "encoder": uplink.encoder}
    if task is not None:
        modules |= {"decoder": downlink.decoder, "last": last, "head": task.head}
    for module in modules.values():
        module.to(device)
    trainable = trainable_parts(recipe)
    if not trainable.first_part:
        first.requires_grad_(False)
    # Each end of a bottleneck is trained with the side that holds it; the cloud's ends are built with its side.
    if not trainable.first_part or (recipe.uplink.kind == "low_rank" and not recipe.uplink.trained):
        uplink.encoder.requires_grad_(False)
    if recipe.downlink.kind == "low_rank" and not recipe.downlink.trained:
        downlink.decoder.requires_grad_(False)
    if not trainable_parameters(modules):
        raise RecipeError(
            f"start_block={recipe.start_block}, trainable={recipe.trainable} and labels={recipe.labels} "
            "leave the edge nothing to train; allowed: more blocks at the edge, or a low-rank cut that is trained"
        )
    config = TuneConfig(
        seed=recipe.seed,
        total_steps=total_steps,
        training=recipe.training,
        lora=recipe.lora,
        train_cloud=trainable.cloud,
        pooling=downlink_pooling("none" if head is None else head.pooling, last),
        uplink=_cut_config(recipe, recipe.uplink, uplink),
        downlink=_cut_config(recipe, recipe.downlink, downlink),
        head=head if labels_cross else None,
    )
    return EdgeSetup(recipe, plan, config, first, last, task, uplink, downlink)
