"""Worker of a teacher's fine-tuning: the function that Ray Train runs in every process."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero

from raycloud.cluster.runtime import threads_per_actor
from raycloud.cluster.teacher.loop import HELD_OUT_LOSS, TeacherLoop
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.cluster.teacher.shards import ShardedCheckpoint, latest_undamaged
from raycloud.data.tokens import TokenFile

_LOG = logging.getLogger(__name__)


def train(config: dict[str, Any]) -> None:
    """Train from the last checkpoint, or from the beginning, to the last step.

    Args:
        config: ``recipe`` as plain values; ``train`` and ``held_out``, token files; ``pad``, the padding token id;
            ``steps`` in total; ``records``, a queue for the first worker's measurements; ``log``, the log of the run.
    """
    recipe, context = TuneTeacherRecipe.model_validate(config["recipe"]), ray.train.get_context()
    config["log"].of(f"worker {context.get_world_rank()}").attach()
    torch.set_num_threads(threads_per_actor(recipe.threads, "cloud", context.get_world_size()))

    def say(record: dict[str, Any]) -> None:
        if context.get_world_rank() == 0:
            config["records"].put(record)

    what = (recipe, TokenFile(config["train"]), TokenFile(config["held_out"]), config["pad"], config["steps"])
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        loop = TeacherLoop(*what)
        say({"kind": "held_out", "step": 0, HELD_OUT_LOSS: loop.evaluate()})
    else:
        with checkpoint.as_directory() as folder:
            # One worker reads all files to verify their checksums, for all workers.
            first = context.get_world_rank() == 0
            sound = broadcast_from_rank_zero(str(latest_undamaged(Path(folder))) if first else None)
            loop = TeacherLoop(*what, begun=ShardedCheckpoint(Path(sound)))
    _LOG.info("starts at step %d of %d, process %d", loop.step, config["steps"], os.getpid())
    say({"kind": "start", "step": loop.step, "workers": context.get_world_size(), "pid": os.getpid()})
    while loop.step < config["steps"]:
        say({"kind": "step", **loop.train()})
        if loop.step % recipe.checkpoints.every == 0 or loop.step == config["steps"]:
            _report(loop, say)


def _report(loop: TeacherLoop, say: Any) -> None:
    held_out = loop.evaluate()
    say({"kind": "held_out", "step": loop.step, HELD_OUT_LOSS: held_out})

    def write(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Write the checkpoint to its final place: Ray would not flush its own copy before removing an older one."""
        folder = Path(ray.train.get_context().get_storage().experiment_fs_path) / name
        loop.save(folder)
        return ray.train.Checkpoint.from_directory(str(folder))

    # NaN compares with nothing, so Ray would keep arbitrary checkpoints as the best.
    score = held_out if math.isfinite(held_out) else math.inf
    with tempfile.TemporaryDirectory() as nothing:  # Ray requires a directory to upload
        ray.train.report(
            {HELD_OUT_LOSS: score, "step": loop.step},
            checkpoint=ray.train.Checkpoint.from_directory(nothing),
            checkpoint_upload_fn=write,
        )
    _LOG.info("checkpoint at step %d", loop.step)
