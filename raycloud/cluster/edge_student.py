"""Student at an edge: trains on its own shard from the teacher's signals, round by round."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from torch import Tensor
from transformers import PretrainedConfig

from raycloud.cluster.cloud_teacher import TeacherInfo
from raycloud.cluster.object_store_signals import ObjectStoreSignals
from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import threads_per_actor
from raycloud.distill.learner import Heartbeat, StudentLearner, StudentUpdate
from raycloud.distill.recipe import DistillRecipe
from raycloud.distill.signals import FrozenHead
from raycloud.link.meter import Meter
from raycloud.models.weights import Weights

_LOG = logging.getLogger(__name__)


class TeacherActors:
    """Implementation of :class:`~raycloud.distill.learner.TeacherClient` by the actors of a job's teacher.

    Args:
        names: names of the actors.
        recipe: whole distillation recipe.
        cohort: cohort of the student.
    """

    def __init__(self, names: Sequence[str], recipe: DistillRecipe, cohort: str) -> None:
        self._recipe, self._cohort = recipe, cohort
        self._replicas = [ray.get_actor(name) for name in names]
        self.info: TeacherInfo = self._ask("prepare")
        self.name, self.tokenizer = self.info.name, self.info.tokenizer

    def signals(self, meter: Meter) -> ObjectStoreSignals:
        """Return the source of signals that come through the object store."""
        recipe = self._recipe
        return ObjectStoreSignals(
            self._replicas, self.name, recipe.signal, recipe.temperatures, recipe.teacher.timeout_s, meter
        )

    def head(self) -> FrozenHead:
        """Return a copy of the teacher's head."""
        found: FrozenHead = self._ask("head")
        return found

    def embedding(self) -> Tensor:
        """Return the teacher's input embedding."""
        found: Tensor = self._ask("embedding")
        return found

    def frozen(self) -> Weights:
        """Return the frozen weights under the cohort's adapters."""
        found: Weights = self._ask("frozen", self._cohort)
        return found

    def _ask(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._replicas[0], method).remote(*arguments), timeout=self._recipe.teacher.timeout_s)


class EdgeStudent:
    """Actor with the resource ``edge``. It loses its state with its process and recovers from its folder of states.

    Args:
        index: index of its edge in the recipe's ``edges``.
        recipe: whole distillation recipe.
        config: config of the student model.
        replicas: names of the teacher's actors.
        state: folder for the optimizer states, one file per round; on the edge's own disk where none is shared.
        log: log of the run; None for none.
    """

    def __init__(
        self,
        index: int,
        recipe: DistillRecipe,
        config: PretrainedConfig,
        replicas: Sequence[str],
        state: Path,
        log: RunLog | None = None,
    ) -> None:
        if log is not None:
            log.attach()
        self._edge, self._recipe, self._config, self._names = recipe.edges[index], recipe, config, replicas
        self._folder = state / self._edge.name
        self._latest = 0
        self._heartbeat: Heartbeat | None = None
        self._student: StudentLearner | None = None

    @ray.method(max_task_retries=-1)
    def prepare(self) -> int:
        """Get the teacher's tokenizer, load this edge's own data and return the number of samples.

        The constructor's arguments are small, since Ray keeps them for restarts.

        Raises:
            DataError: the edge has no data.
        """
        return self._learner().samples

    def _learner(self) -> StudentLearner:
        """Load tokenizer and data; a second call does nothing."""
        if self._student is None:
            recipe = self._recipe
            self._student = StudentLearner(
                recipe,
                self._edge,
                self._config,
                TeacherActors(self._names, recipe, recipe.cohort_of(self._edge).name),
                self._folder,
                threads=threads_per_actor(recipe.threads, "edge", len(recipe.edges) - len(recipe.devices)),
            )
            _LOG.info("ready with %d samples, process %d", self._student.samples, os.getpid())
        return self._student

    @ray.method(concurrency_group="control", max_task_retries=-1)
    def heartbeat(self) -> Heartbeat | None:
        """Return the student's latest heartbeat; None before the first step of a round."""
        return self._heartbeat

    @ray.method(concurrency_group="control", max_task_retries=-1)
    def advance(self, round_id: int) -> None:
        """Set the newest round id. If the student trains for an older one, it stops between two steps."""
        self._latest = max(self._latest, round_id)

    def train(self, round_id: int, current: int, weights: Weights) -> StudentUpdate | None:
        """Train for one round from the given weights and save the optimizer state; None if a newer round id arrives.

        Args:
            round_id: id that grows with every attempt at a round; an attempt with an old id stops.
            current: index of the round, counted from 0.
            weights: averaged weights that the round starts from.

        Raises:
            TrainingError: some trained weights are not finite; nothing of the round is saved.
        """
        learner = self._learner()
        self._latest, self._heartbeat = max(self._latest, round_id), None
        return learner.train(current, weights, self._on_heartbeat, lambda: self._latest > round_id)

    def _on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
