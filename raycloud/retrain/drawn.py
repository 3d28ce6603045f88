"""Training of blocks that are drawn anew every few steps: rivals of a plan made before the training."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from torch import nn

from raycloud.retrain.parts import RetrainParts
from raycloud.retrain.trainer import BlockTrainer
from raycloud.training.loop import Step


class DrawnBlockTrainer(BlockTrainer):
    """Trains the head and one block at a time (LISA, Pan et al. 2024, arXiv 2403.17919).

    A block that is drawn begins without moments, so memory is that of one block. Every step runs all blocks forward, as
    any of them may have changed, and the changes of all drawn blocks are sent.

    Args:
        model: the edge's model.
        parts: its parts.
        arguments: further arguments of :class:`~raycloud.retrain.trainer.BlockTrainer`.
        period: number of steps with one block.
        temperature: None draws all blocks alike. A number draws a block with a probability in proportion to
            exp(gradient norm / (temperature · largest norm)), with the mean norms of the steps that trained it (MISA,
            2025, arXiv 2511.00056, whose modules are parts of blocks).
        options: further options.
    """

    def __init__(
        self,
        model: Any,
        parts: RetrainParts,
        *arguments: Any,
        period: int = 5,
        temperature: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, parts.groups(range(len(parts.blocks))), *arguments, start=0, **options)
        self._head = list(parts.head.values())
        self._blocks = [list(block.parameters()) for block in parts.blocks.values()]
        self._period, self._temperature, self._seed = period, temperature, int(options["seed"])
        self._norms = np.full(len(self._blocks), np.nan)
        self._current = -1

    def _trained_in(self, step: int) -> tuple[Hashable, Sequence[nn.Parameter]]:
        if step % self._period == 0:
            if self._current >= 0:
                for one in self._blocks[self._current]:
                    self._trainer.optimizer.state.pop(one, None)
            self._current = self._draw(step // self._period)
        return self._current, [*self._head, *self._blocks[self._current]]

    def _draw(self, number: int) -> int:
        random = np.random.default_rng((self._seed, number))
        if self._temperature is None:
            return int(random.integers(len(self._blocks)))
        if np.isnan(self._norms).any():  # each block once at first
            return int(random.choice(np.flatnonzero(np.isnan(self._norms))))
        scores = np.exp(self._norms / (self._temperature * max(self._norms.max(), 1e-12)))
        return int(random.choice(len(scores), p=scores / scores.sum()))

    def _after(self, step: Step) -> None:
        known = self._norms[self._current]
        self._norms[self._current] = step.grad_norm if math.isnan(known) else 0.5 * (known + step.grad_norm)
