"""One worker of a teacher's fine-tuning: the function that Ray Train runs in every process."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch

from raycloud.cluster.runtime import share_of_cores
from raycloud.cluster.teacher.loop import HELD_OUT, Loop
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.cluster.teacher.shards import Shards
from raycloud.data.tokens import TokenFile

_LOG = logging.getLogger(__name__)


def train(config: dict[str, Any]) -> None:
    """Train from the last checkpoint, or from the beginning, to the end.

    Args:
        config: ``recipe`` as plain values; ``train`` and ``held_out``, files of tokens; ``pad``, the tokenizer's
            padding; ``steps`` in all; ``records``, a queue for what the first worker measures; ``log``, the run's.
    """
    recipe, context = TuneTeacherRecipe.model_validate(config["recipe"]), ray.train.get_context()
    config["log"].of(f"worker {context.get_world_rank()}").attach()
    torch.set_num_threads(share_of_cores(recipe.threads, "cloud", context.get_world_size()))

    def say(record: dict[str, Any]) -> None:
        if context.get_world_rank() == 0:
            config["records"].put(record)

    what = (recipe, TokenFile(config["train"]), TokenFile(config["held_out"]), config["pad"], config["steps"])
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        loop = Loop(*what)
        say({"kind": "held_out", "step": 0, HELD_OUT: loop.judge()})
    else:
        with checkpoint.as_directory() as folder:
            loop = Loop(*what, begun=Shards(Path(folder)))
    _LOG.info("starts at step %d of %d, process %d", loop.step, config["steps"], os.getpid())
    say({"kind": "start", "step": loop.step, "workers": context.get_world_size(), "pid": os.getpid()})
    while loop.step < config["steps"]:
        say({"kind": "step", **loop.train()})
        if loop.step % recipe.checkpoints.every == 0 or loop.step == config["steps"]:
            _report(loop, say)


def _report(loop: Loop, say: Any) -> None:
    held_out = loop.judge()
    say({"kind": "held_out", "step": loop.step, HELD_OUT: held_out})
    with tempfile.TemporaryDirectory() as scratch:
        loop.save(Path(scratch))
        torch.distributed.barrier()
        checkpoint = ray.train.Checkpoint.from_directory(scratch)
        ray.train.report({HELD_OUT: held_out, "step": loop.step}, checkpoint=checkpoint)
    _LOG.info("checkpoint at step %d", loop.step)
