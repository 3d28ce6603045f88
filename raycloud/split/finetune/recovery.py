"""Recovery of a run: its steps with checkpoints of both sides, repeated when the cloud loses its session."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from raycloud.data.batches import Batch
from raycloud.link.client import SessionLost
from raycloud.split.finetune.checkpoints import CheckpointStore, latest_usable
from raycloud.split.finetune.client import CloudClient
from raycloud.split.finetune.edge_trainer import EdgeTrainer
from raycloud.split.finetune.group_client import GroupClient
from raycloud.training.loop import Step

log = logging.getLogger(__name__)

MAX_LOST_SESSIONS = 5
"""Largest number of times in a row that the cloud may lose a session without a new checkpoint."""


def train(
    edge: EdgeTrainer,
    batches_of: Callable[[int], Sequence[Batch]],
    *,
    steps: int,
    every: int,
    kept: CheckpointStore,
    cloud_at: Callable[[int], CloudClient],
    on_step: Callable[[Step], None] = lambda step: None,
    group_client: GroupClient | None = None,
    then: Callable[[], None] = lambda: None,
) -> None:
    """Train to the last step, from the latest checkpoint if there is one.

    A checkpoint is valid once the edge has written its own state, after the cloud's. If the cloud loses its session,
    both sides continue from the latest checkpoint: steps are a function of (seed, step), so both end with the weights
    of an uninterrupted run.

    Args:
        edge: untrained edge, with a cloud at the latest checkpoint, or an untrained one if there is none.
        batches_of: returns the micro-batches of a step.
        steps: total number of steps.
        every: number of steps between checkpoints.
        kept: store of the edge's checkpoints.
        cloud_at: opens the cloud again at a checkpoint.
        on_step: called with every step, again if it is repeated.
        group_client: client of the group's rounds, called between rounds of steps; if a round ended without this edge,
            it is called between two steps. There is a checkpoint before each call, and the group itself stores the
            aggregated weights.
        then: called after the last step, with the cloud in its final state.

    Raises:
        LinkError: the cloud cannot be reached, or refuses.
        TrainingError: gradients stay non-finite, or a checkpoint cannot be read.
    """
    if latest := kept.steps()[-1:]:
        edge.load(kept.load(*latest))
    else:
        save_checkpoint(edge, kept)

    def go() -> None:
        syncs = group_client is not None
        while True:
            if syncs and group_client is not None:
                group_client.sync(edge)
            step = edge.trainer.step_index
            if step >= steps:
                return then()
            on_step(edge.step(batches_of(step)))
            syncs = group_client is not None and group_client.sync_due(edge)
            if (step + 1) % every == 0 or step + 1 == steps or syncs:
                save_checkpoint(edge, kept)

    retry_from_checkpoint(go, edge, kept, cloud_at)


def save_checkpoint(edge: EdgeTrainer, kept: CheckpointStore) -> None:
    """Save a checkpoint of both sides."""
    step = edge.trainer.step_index
    edge.wait_for_optimiser()
    edge.cloud.save(step)
    kept.save(step, edge.state())


def last_common_checkpoint(
    kept: CheckpointStore, cloud_at: Callable[[int], CloudClient]
) -> tuple[int, CloudClient] | None:
    """Latest checkpoint that both sides can read, with the cloud restored to it; None if there are no checkpoints.

    Damaged checkpoints are reported, and later ones than the result are removed.

    Args:
        kept: store of the edge's checkpoints.
        cloud_at: opens the cloud at a checkpoint.

    Raises:
        TrainingError: the edge can read none of its checkpoints, or the cloud in this process none of its own.
        LinkError: the cloud cannot be reached, or has none of them.
    """

    def opened(step: int) -> tuple[int, CloudClient]:
        kept.check(step)
        return step, cloud_at(step)

    return latest_usable(kept, opened, "trying the checkpoint before it")


T = TypeVar("T")


def retry_from_checkpoint(
    work: Callable[[], T], edge: EdgeTrainer, kept: CheckpointStore, cloud_at: Callable[[int], CloudClient]
) -> T:
    """Run ``work``, which needs the cloud; repeat it from the latest checkpoint if the session is lost.

    Raises:
        SessionLost: there is no checkpoint, or the session was lost too many times without a newer one.
    """
    lost, at = 0, -1
    while True:
        try:
            return work()
        except SessionLost as error:
            steps = kept.steps()
            if not steps:
                raise
            lost, at = (lost + 1 if steps[-1] == at else 1), steps[-1]
            if lost > MAX_LOST_SESSIONS:
                raise SessionLost(f"{error} ({lost} times after step {at})") from None
            edge.cloud.close()
            found = last_common_checkpoint(kept, cloud_at)
            assert found is not None
            at, edge.cloud = found
            log.info("going back to step %d: %s", at, error)
            edge.load(kept.load(at))
