"""Steps of a teacher's fine-tuning, in any process group of ``torch.distributed``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from raycloud.cluster.teacher.engine import TeacherEngine
from raycloud.cluster.teacher.recipe import TuneTeacherRecipe
from raycloud.cluster.teacher.shards import ShardedCheckpoint, save, write_shard_checksums
from raycloud.data.batches import Batch, SampleOrder, collate
from raycloud.data.tokens import TokenFile
from raycloud.durable import writing
from raycloud.errors import TrainingError
from raycloud.training.schedule import lr_factor

HELD_OUT_LOSS = "held_out_loss"


class TeacherLoop:
    """Training loop whose sample order is a function of (seed, step) alone, not of the number of workers.

    All workers of the process group make the same calls in the same order.

    Args:
        recipe: recipe of the fine-tuning; ``workers.count`` is the size of the process group.
        samples: training samples.
        held_out: held-out samples.
        pad: padding token id.
        steps: total number of optimizer steps, where the schedule ends.
        begun: checkpoint to resume from; None to start from the beginning.
    """

    def __init__(
        self,
        recipe: TuneTeacherRecipe,
        samples: TokenFile,
        held_out: TokenFile,
        pad: int,
        steps: int,
        begun: ShardedCheckpoint | None = None,
    ) -> None:
        self.recipe, self._samples, self._held_out, self._pad, self._steps = recipe, samples, held_out, pad, steps
        self._rank, self._world = distributed.get_rank(), distributed.get_world_size()
        self._order = SampleOrder(samples.lengths, recipe.training.batch_size, recipe.seed)
        self.step = 0 if begun is None else int(begun.facts["step"])
        """Number of optimizer steps done."""
        self._updates = 0 if begun is None else int(begun.facts["updates"])
        self._engine = TeacherEngine.of(recipe, begun)

    def train(self) -> dict[str, Any]:
        """Do one optimizer step on the mean over all its tokens, however they fall into micro-batches and workers.

        Returns:
            ``step`` (counted from 1), ``loss`` in nats per token, ``grad_norm`` before clipping, ``lr``, ``tokens``
            (labelled ones), ``read`` (tokens including prompts), ``skipped``, ``seconds``.

        Raises:
            TrainingError: no token is labelled, or the loss is not finite.
        """
        begun, training, engine = time.perf_counter(), self.recipe.training, self._engine.engine
        factor = lr_factor(self.step, self._steps, training.warmup_steps, training.schedule, training.lr_floor)
        self._engine.set_lr(training.lr * factor)
        micros = [
            self._order.indices(self.step * training.gradient_accumulation_steps + micro)
            for micro in range(training.gradient_accumulation_steps)
        ]
        every = np.concatenate(micros)
        tokens = int(self._samples.targets[every].sum())
        if tokens == 0:
            raise TrainingError(f"step {self.step}: no labelled token in its {len(micros)} micro-batches")
        # DeepSpeed averages over micro-batches and workers.
        scale, total = self._world * len(micros) / tokens, 0.0
        for micro, which in enumerate(micros):
            torch.manual_seed(hash((self.recipe.seed, self.step, micro, self._rank)) & 0x7FFF_FFFF_FFFF_FFFF)  # dropout
            nll = self._engine.nll(self._batch(self._samples, which[self._rank :: self._world]))
            engine.backward(nll * scale)
            norm = self._engine.step()
            total += float(nll.detach())
        (loss,) = self._sums(total / tokens)
        if not math.isfinite(loss):
            raise TrainingError(f"step {self.step}: the loss is {loss}")
        skipped = norm is None  # in float16, when the loss scale is too large
        self.step, self._updates = self.step + 1, self._updates + (not skipped)
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": training.lr * factor,
            "tokens": tokens,
            "read": int(self._samples.lengths[every].sum()),
            "skipped": skipped,
            "seconds": time.perf_counter() - begun,
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean −log p of the tokens of the held-out responses, in nats."""
        self._engine.engine.eval()
        nll, tokens = 0.0, 0
        for which, counts in self._shares():
            batch = self._batch(self._held_out, which)
            found = float(self._engine.nll(batch))
            if counts:
                nll, tokens = nll + found, tokens + batch.targets
        self._engine.engine.train()
        all_nll, all_tokens = self._sums(nll, tokens)
        return all_nll / all_tokens

    def save(self, folder: Path) -> None:
        """Write a checkpoint, each worker its part; it is on the disk when the first worker returns.

        Args:
            folder: folder shared by all workers; created if missing.

        Raises:
            StorageError: it cannot be written.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        save(folder, self._engine.engine, self._engine.named, {"step": self.step, "updates": self._updates})
        distributed.barrier()
        if self._rank == 0:
            write_shard_checksums(folder)

    def _batch(self, source: TokenFile, which: Iterable[int]) -> Batch:
        return collate([source[int(index)] for index in which], self._pad)

    def _shares(self) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield this worker's held-out batches, and whether they count: all workers need the same number of batches."""
        order = np.argsort(self._held_out.lengths, kind="stable")
        size = self.recipe.training.batch_size
        for at in range(0, len(order), size):
            mine = order[at : at + size][self._rank :: self._world]
            yield (mine if len(mine) else order[:1]), len(mine) > 0

    def _sums(self, *values: float) -> list[float]:
        """Return the sums of the values over all workers."""
        some = torch.tensor(values, dtype=torch.float64, device=self._engine.device)
        distributed.all_reduce(some)
        found: list[float] = some.tolist()
        return found
