"""Both sides of a run before its first step: the edge's setup, and the cloud in this process or over a link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from raycloud.data.batches import Batch
from raycloud.errors import RecipeError
from raycloud.link.channel import Channel
from raycloud.models.loading import load
from raycloud.models.segments import cut_segments
from raycloud.models.structure import pooler_of
from raycloud.split.finetune.assembly import EdgeSetup, build_edge_setup, plan_of
from raycloud.split.finetune.checkpoints import CheckpointStore
from raycloud.split.finetune.client import CloudClient, LocalCloudClient, RemoteCloudClient
from raycloud.split.finetune.cloud_assembly import build_cloud
from raycloud.split.finetune.edge_data import EdgeData
from raycloud.split.finetune.edge_trainer import EdgeTrainer
from raycloud.split.finetune.messages import GroupConfig
from raycloud.split.finetune.recipe import SplitTuneRecipe
from raycloud.split.finetune.recovery import last_common_checkpoint
from raycloud.split.parts import load_edge
from raycloud.split.plan import PlanSet

Connect = Callable[[str], Channel]
"""Function that opens a channel to the cloud for a session's id, or for one that keeps sessions together."""


@dataclass(frozen=True)
class Sides:
    """Both sides of a run."""

    data: EdgeData
    setup: EdgeSetup
    cloud_at: Callable[[int | None], CloudClient]
    """Opens the cloud at the checkpoint of a step, or untrained for None."""
    model: PreTrainedModel | None = None
    """Model that both sides train in place, if they are in one process."""
    max_in_flight: int = 1
    """Largest number of micro-batches in flight; in one process nothing overlaps."""

    def start(self, kept: CheckpointStore) -> EdgeTrainer:
        """Edge trainer with a cloud at their last common checkpoint; untrained on both sides if there is none.

        The edge's own state is loaded by :func:`~raycloud.split.finetune.recovery.train`.

        Raises:
            LinkError: the cloud cannot be reached, or refuses.
            TrainingError: no checkpoint can be read.
        """
        latest = last_common_checkpoint(kept, self.cloud_at)
        return self.fitted() if latest is None else self.setup.edge(latest[1], self.max_in_flight)

    def fitted(self) -> EdgeTrainer:
        """Edge trainer with an untrained cloud whose bottleneck is fitted."""
        edge = self.setup.edge(self.cloud_at(None), self.max_in_flight)
        edge.fit(self.data.calibration())
        return edge


def build_local_setup(
    model: PreTrainedModel,
    recipe: SplitTuneRecipe,
    calibration: Sequence[Batch],
    *,
    classes: int = 0,
    total_steps: int,
    kept: CheckpointStore | None = None,
) -> tuple[EdgeSetup, LocalCloudClient]:
    """Build the edge's setup and the cloud's side in this process.

    Args:
        model: model to be cut; its weights are trained in place.
        recipe: recipe of the run.
        calibration: calibration texts for the bottlenecks.
        classes: number of classes, for a classification.
        total_steps: step at which the learning rate's schedule ends.
        kept: store of the cloud's checkpoints.

    Raises:
        ModelError: the model cannot be cut so.
    """
    plan, pooler = plan_of(recipe, model.config), pooler_of(model)
    first, middle, last = cut_segments(model, plan.start_block, plan.end_block)
    setup = build_edge_setup(recipe, first, last, calibration, classes=classes, total_steps=total_steps, pooler=pooler)
    cloud = build_cloud(setup.config, middle, last, pooler, decoder=setup.uplink_bottleneck.decoder)
    return setup, LocalCloudClient(cloud, kept=kept)


def build_local_edge(
    model: PreTrainedModel,
    recipe: SplitTuneRecipe,
    calibration: Sequence[Batch],
    *,
    classes: int = 0,
    total_steps: int,
) -> EdgeTrainer:
    """Build the edge trainer with a fitted cloud in this process; see :func:`build_local_setup`."""
    setup, cloud = build_local_setup(model, recipe, calibration, classes=classes, total_steps=total_steps)
    edge = setup.edge(cloud)
    edge.fit(calibration)
    return edge


def local_sides(data: EdgeData, steps: int, folder: Path, notify: Callable[[str], None]) -> Sides:
    """Load the whole model and build both sides in this process.

    Args:
        data: texts of the edge.
        steps: total number of steps.
        folder: folder of the cloud's checkpoints.
        notify: called with one line before a download or conversion.
    """
    recipe, kept = data.recipe, CheckpointStore(folder)
    model = load(recipe.model, device=recipe.device, dtype="float32", notify=notify).model
    setup, cloud = build_local_setup(
        model, recipe, data.calibration(), classes=data.classes, total_steps=steps, kept=kept
    )

    def cloud_at(step: int | None) -> CloudClient:
        if step is not None:
            cloud.trainer.load(step, kept.load(step))
        return cloud

    return Sides(data, setup, cloud_at, model)


def remote_sides(data: EdgeData, steps: int, run: str, connect: Connect, group: GroupConfig | None = None) -> Sides:
    """Load the edge's parts; the cloud is at the other end of a link.

    Args:
        data: texts of the edge.
        steps: total number of steps.
        run: id of the run, under which the cloud keeps checkpoints.
        connect: opens a channel to the cloud.
        group: group that the edge trains with; None for an edge that trains alone.

    Raises:
        RecipeError: the recipe needs both sides in one process, or a batch takes more bytes than a message may have.
            The function that opens the session raises it for the limits that the cloud grants.
    """
    recipe, calibration = data.recipe, data.calibration()
    part = load_edge(
        recipe.model,
        PlanSet.of(data.plan),
        device=recipe.device,
        dtype="float32",
        training=True,
        pooler=recipe.uses_pooler,
    )
    setup = build_edge_setup(
        recipe, part.first, part.last, calibration, classes=data.classes, total_steps=steps, pooler=part.pooler
    )
    setup.check_batch_size(data.max_batch_tokens(steps), calibration)
    opening = setup.begin(part.fingerprint, run).model_copy(update={"group": group})

    def open_channel(session: str) -> Channel:
        # By the group's name a router keeps all its sessions at one replica, which the rounds need.
        return connect(session if group is None else group.group)

    def cloud_at(step: int | None) -> CloudClient:
        at_step = opening.model_copy(update={"restore": step})
        cloud = RemoteCloudClient(open_channel, at_step, setup.uplink_bottleneck.decoder)
        try:
            setup.check_batch_size(data.max_batch_tokens(steps), calibration, cloud.granted)
        except RecipeError:
            cloud.close()
            raise
        return cloud

    return Sides(data, setup, cloud_at, max_in_flight=recipe.max_in_flight)
