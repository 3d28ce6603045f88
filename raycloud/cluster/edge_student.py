"""A student at an edge: trains on its own shard from the teacher's signals, round by round."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from raycloud.cluster.object_store_signals import ObjectStoreSignals
from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import computing_with, share_of_cores
from raycloud.data.batches import SampleOrder
from raycloud.distill.health import DataHealth, Health, Monitor
from raycloud.distill.objective import Sizes
from raycloud.distill.objectives.dskd_cma import DSKDCMA
from raycloud.distill.pairs import Words
from raycloud.distill.recipe import DistillRecipe
from raycloud.distill.shard import Shard, origin_of
from raycloud.distill.signal_file import FileSignals, MeteredSignals
from raycloud.distill.signals import FrozenHead, SignalStore
from raycloud.distill.student import Lesson, loss_from_signals, student_from
from raycloud.link.meter import Meter
from raycloud.models.loading import pick_device
from raycloud.models.segments import Segment
from raycloud.models.weights import Weights, nbytes
from raycloud.results import write_folder
from raycloud.training.loop import Step, Trainer
from raycloud.training.lora import learnt_weights, load_learnt
from raycloud.training.precision import compute_type

_EXTRAS = "extras/"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beat:
    """Where a student is: for the progress display, and a sign of life."""

    round: int
    step: int
    loss: float
    tokens_per_second: float
    pid: int
    """Of the process, to find it on its node."""


@dataclass(frozen=True)
class Answer:
    """What a student brings back from a round."""

    name: str
    round: int
    weights: dict[str, Tensor]
    tokens: int
    steps: list[Step]
    seconds: float
    meter: Meter
    health: Health


class EdgeStudent:
    """An actor with the resource ``edge``. It loses its memory with its process and recovers from its own disk.

    Args:
        index: which of the recipe's edges it is.
        recipe: the whole recipe.
        config: the model's.
        replicas: names of the teacher's actors.
        state: folder for the optimiser's state, one file a round; on the edge's own disk where none is shared.
        log: the run's; None for none.
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
        self._cohort = recipe.cohort_of(self._edge)
        self._objective = self._cohort.objective
        self._folder = state / self._edge.name
        self._latest = 0
        self._beat: Beat | None = None
        self._ready = False

    @ray.method(max_task_retries=-1)
    def prepare(self) -> int:
        """Learn the teacher's tokenizer and load this edge's own data; how many samples it has.

        The constructor takes little, since Ray must keep its arguments for restarts.

        Raises:
            DataError: the edge has no data.
        """
        self._load()
        return len(self._shard.samples)

    def _load(self) -> None:
        """Does nothing the second time."""
        if not self._ready:
            self._replicas = [ray.get_actor(name) for name in self._names]
            facts = self._ask("prepare")
            self._teacher, self._tokenizer = facts.name, facts.tokenizer
            self._shard = Shard.of(self._recipe, self._edge, self._tokenizer)
            lengths = [len(sample.ids) for sample in self._shard.samples]
            self._order = SampleOrder(lengths, self._recipe.training.batch_size, self._recipe.seed)
            tally, own = self._shard.tally, self._shard.own
            self._data_health = DataHealth.of(tally, self._tokenizer, own, self._shard.pairs)
            self._device = pick_device(self._recipe.device)
            self._kept: FileSignals | None = None
            self._trainer: Trainer | None = None
            self._through: int | None = None
            self._head: FrozenHead | None = None
            self._words: Tensor | None = None
            self._extras: torch.nn.Module | None = None
            self._ready = True
            _LOG.info("ready with %d samples, process %d", len(self._shard.samples), os.getpid())

    @ray.method(concurrency_group="control", max_task_retries=-1)
    def beat(self) -> Beat | None:
        """Where the student is in its round."""
        return self._beat

    @ray.method(concurrency_group="control", max_task_retries=-1)
    def advance(self, round_id: int) -> None:
        """Tell the student the newest round id; if the one it trains for is older, it stops between two steps."""
        self._latest = max(self._latest, round_id)

    def train(self, round_id: int, current: int, weights: Weights) -> Answer | None:
        """Train for one round from the given weights and save the optimiser's state; None if the round is over before.

        Args:
            round_id: grows with every attempt at a round; an old one is not trained for.
            current: the round, counted from 0.
            weights: the average that the round starts from.
        """
        start = time.perf_counter()
        self._load()
        self._latest, self._beat = max(self._latest, round_id), None
        meter = Meter()
        signals = self._signals(meter)
        meter.add("weights_down", nbytes(weights))
        trainer = self._resumed(current, weights, meter)
        monitor = Monitor(self._objective, len(self._tokenizer))
        loss = loss_from_signals(
            self._segment, self._objective, signals, self._head, self._words, self._extras, self._shard.pairs, monitor
        )
        steps: list[Step] = []
        with computing_with(share_of_cores(self._recipe.threads, "edge", len(self._recipe.edges))):
            self._prefetch(signals, trainer.step_index)
            for _ in range(self._recipe.rounds.steps):
                if self._latest > round_id:
                    _LOG.warning("round %d is over, left at step %d", current + 1, len(steps))
                    return None
                lessons = self._lessons(trainer.step_index)
                if len(steps) + 1 < self._recipe.rounds.steps:
                    self._prefetch(signals, trainer.step_index + 1)
                monitor.begin(trainer.step_index)
                steps.append(trainer.step(lessons, loss))
                tokens = sum(step.tokens for step in steps)
                seconds = time.perf_counter() - start
                self._beat = Beat(current, len(steps), steps[-1].loss, tokens / seconds, os.getpid())
        self._save(current, trainer)
        self._through = current
        learnt = {name: tensor.cpu() for name, tensor in learnt_weights(self._model).items()}
        meter.add("weights_up", nbytes(learnt))
        tokens = sum(step.tokens for step in steps)
        health = monitor.report(self._data_health)
        _LOG.info("round %d: %d steps in %.1f s", current + 1, len(steps), time.perf_counter() - start)
        return Answer(self._edge.name, current, learnt, tokens, steps, time.perf_counter() - start, meter, health)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self._replicas[0], method).remote(*arguments), timeout=self._recipe.teacher.timeout_s)

    def _signals(self, meter: Meter) -> SignalStore:
        recipe = self._recipe
        if recipe.teacher.signals is None or not self._objective.kd_weight:
            return ObjectStoreSignals(
                self._replicas, self._teacher, recipe.signal, recipe.temperatures, recipe.teacher.timeout_s, meter
            )
        if self._kept is None:
            self._kept = FileSignals(recipe.teacher.signals, origin_of(recipe, self._teacher, self._tokenizer))
        return MeteredSignals(self._kept, meter)

    def _prefetch(self, signals: SignalStore, step: int) -> None:
        """Have the teacher work on a step's batches ahead of it, where it is asked at all."""
        if self._objective.kd_weight and isinstance(signals, ObjectStoreSignals):
            for lesson in self._lessons(step):
                signals.prefetch(lesson.asked)

    def _lessons(self, step: int) -> list[Lesson]:
        """The micro-batches of a global step: a pure function of it."""
        accumulate = self._recipe.training.accumulate
        return [self._shard.lesson(self._order.indices(step * accumulate + micro)) for micro in range(accumulate)]

    def _resumed(self, current: int, weights: Weights, meter: Meter) -> Trainer:
        """The trainer as it stood at the end of the round before, with this round's weights."""
        recipe = self._recipe
        if self._trainer is None:
            frozen: Weights = {}
            student = self._cohort.student
            if student.lora is not None:
                frozen = self._ask("frozen", self._cohort.name)
                meter.add("frozen", nbytes(frozen))
            self._model = student_from(self._config, weights, frozen, student, self._device).train()
            if recipe.training.gradient_checkpointing:
                self._model.gradient_checkpointing_enable()
            self._segment = Segment(self._model)
            self._fetch(meter)
            # Projectors and their like stay at their edge: they belong to one student and one teacher.
            self._extras = self._initial_extras()
            modules = {"student": self._model, **({} if self._extras is None else {"extras": self._extras})}
            self._trainer = Trainer(
                modules,
                recipe.training,
                total_steps=recipe.rounds.count * recipe.rounds.steps,
                seed=recipe.seed,
                lr={"extras": self._objective.extras_lr},
                autocast=compute_type(recipe.dtype, self._device),
            )
        if self._through is None or self._through != current - 1:
            # A new process, or a round that was begun and not finished: what counts is the last finished one.
            finished = [number for number in self._saved() if number < current]
            self._trainer.optimizer.state.clear()
            saved = load_file(self._file(max(finished))) if finished else {}
            if finished:
                self._trainer.load_state({name: one for name, one in saved.items() if not name.startswith(_EXTRAS)})
            if self._extras is not None and (fresh := self._initial_extras()) is not None:
                begun = {name.removeprefix(_EXTRAS): one for name, one in saved.items() if name.startswith(_EXTRAS)}
                self._extras.load_state_dict(begun or fresh.state_dict())
        self._through = None
        load_learnt(self._model, weights)
        # A student that missed a round is where the others are in the schedule.
        self._trainer.step_index = current * recipe.rounds.steps
        return self._trainer

    def _fetch(self, meter: Meter) -> None:
        """What the objective needs of the teacher once, beside its signals."""
        recipe = self._recipe
        if not self._objective.kd_weight or recipe.signal.kind != "hidden":
            return
        head: FrozenHead = self._ask("head")
        meter.add("head", head.nbytes)
        self._head = head.to(self._device, torch.float32)
        if isinstance(self._objective.kd, DSKDCMA):
            words: Tensor = self._ask("words")
            meter.add("words", words.nbytes)
            self._words = words.to(self._device, torch.float32)

    def _initial_extras(self) -> torch.nn.Module | None:
        """A function of the seed and of the models as the run begins."""
        if self._head is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._recipe.seed)
            sizes = Sizes(
                self._config.hidden_size,
                self._head.weight.shape[1],
                self._model.get_output_embeddings().weight.detach(),
                self._head.weight,
                None if self._shard.pairs is None else Words(self._shard.pairs.map, self._device),
            )
            made = self._objective.kd.extras(sizes)
        return None if made is None else made.to(self._device)

    def _save(self, current: int, trainer: Trainer) -> None:
        """Keep this round's state and the one before: which of them a resumed run needs, only the driver knows."""
        folder = self._file(current).parent
        extras = {} if self._extras is None else self._extras.state_dict()
        state = {**trainer.state(), **{f"{_EXTRAS}{name}": one.contiguous() for name, one in extras.items()}}
        write_folder(folder, lambda to: save_file(state, to / self._file(current).name))
        before = [number for number in self._saved() if number < current]
        for number in sorted(before)[:-1]:
            shutil.rmtree(self._file(number).parent)

    def _saved(self) -> list[int]:
        return [int(folder.name.removeprefix("round-")) for folder in self._folder.glob("round-*")]

    def _file(self, number: int) -> Path:
        return self._folder / f"round-{number:04d}" / "optimizer.safetensors"
