"""Training of one student for one round, from the signals of a teacher that may be anywhere.

Actors of a Ray cluster and devices over a link both train with a :class:`StudentLearner`. What it needs of the teacher
is a :class:`TeacherClient`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raycloud.checksums import verify
from raycloud.data.batches import Batch, SampleOrder
from raycloud.distill.alignment.pairs import DeviceVocabularyMap
from raycloud.distill.diagnostics import DataDiagnostics, DiagnosticsMonitor, StudentDiagnostics
from raycloud.distill.objective import ModelSizes
from raycloud.distill.objectives import build_objective
from raycloud.distill.recipe import DistillEdgeRecipe, DistillRecipe
from raycloud.distill.shard import Shard, signal_source
from raycloud.distill.signals import FrozenHead, SignalStore
from raycloud.distill.signals.file import FileSignals, MeteredSignals
from raycloud.distill.student import DistillMicroBatch, build_student, distillation_loss
from raycloud.durable import remove, write_folder
from raycloud.errors import ChecksumError, TrainingError
from raycloud.link.meter import Meter
from raycloud.models.loading import pick_device
from raycloud.models.segments import Segment
from raycloud.models.threads import torch_threads
from raycloud.models.weights import Weights, all_finite, nbytes
from raycloud.training.loop import Step, Trainer
from raycloud.training.lora import load_trainable_weights, trainable_weights
from raycloud.training.precision import compute_dtype

NOT_FINITE = "its weights are not all finite; a smaller training.lr may help"
"""Reason why a student's update is left out of the average."""
_EXTRAS = "extras/"
_LOG = logging.getLogger(__name__)


class RequestedSignals(SignalStore, Protocol):
    """Source of signals that must be requested from a teacher."""

    def prefetch(self, batch: Batch) -> None:
        """Request the signal of a batch that will be needed."""
        ...


class TeacherClient(Protocol):
    """Client of the teacher: what a student needs of it."""

    @property
    def name(self) -> str:
        """Name of the teacher with a fingerprint of its weights."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the teacher."""
        ...

    def signals(self, meter: Meter) -> RequestedSignals:
        """Return the source of signals that the teacher computes on request; the meter counts their bytes."""
        ...

    def head(self) -> FrozenHead:
        """Return a copy of the head, encoded as for the link, for ``hidden`` signals."""
        ...

    def embedding(self) -> Tensor:
        """Return the input embedding (V, d), for objectives that use the teacher's token embeddings."""
        ...

    def frozen(self) -> Weights:
        """Return the frozen weights under the student's adapters."""
        ...


@dataclass(frozen=True)
class Heartbeat:
    """Progress of a student, for the progress display and as a sign that the student is alive."""

    round: int
    step: int
    loss: float
    tokens_per_second: float
    pid: int
    """Id of the process, to find it on its node."""


@dataclass(frozen=True)
class StudentUpdate:
    """Result of one round of one student."""

    name: str
    round: int
    weights: dict[str, Tensor]
    tokens: int
    steps: list[Step]
    seconds: float
    meter: Meter
    diagnostics: StudentDiagnostics


class StudentLearner:
    """Student that trains on its own shard of the data, round by round.

    It keeps its optimizer state in ``folder``, one file per round, and continues from there in another process.

    Args:
        recipe: whole distillation recipe.
        edge: edge of the recipe that this student is.
        config: config of the student model.
        teacher: client of the teacher.
        folder: folder for the optimizer states of this student.
        threads: CPU threads of the training.

    Raises:
        DataError: the edge has no data.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        edge: DistillEdgeRecipe,
        config: PretrainedConfig,
        teacher: TeacherClient,
        folder: Path,
        *,
        threads: int,
    ) -> None:
        self._recipe, self._edge, self._config, self._teacher = recipe, edge, config, teacher
        self._folder, self._threads = folder, threads
        self._cohort = recipe.cohort_of(edge)
        self._objective = self._cohort.objective
        self._shard = Shard.of(recipe, edge, teacher.tokenizer)
        lengths = [len(sample.ids) for sample in self._shard.student_samples]
        self._order = SampleOrder(lengths, recipe.training.batch_size, recipe.seed)
        counts, own = self._shard.counts, self._shard.student_tokenizer
        self._data_diagnostics = DataDiagnostics.of(counts, teacher.tokenizer, own, self._shard.pairs)
        self._device = pick_device(recipe.device)
        self._kept: FileSignals | None = None
        self._trainer: Trainer | None = None
        self._through: int | None = None
        self._head: FrozenHead | None = None
        self._embedding: Tensor | None = None
        self._extras: torch.nn.Module | None = None

    @property
    def samples(self) -> int:
        """Number of training samples."""
        return len(self._shard.student_samples)

    def train(
        self,
        current: int,
        weights: Weights,
        on_heartbeat: Callable[[Heartbeat], None] = lambda heartbeat: None,
        outdated: Callable[[], bool] = lambda: False,
    ) -> StudentUpdate | None:
        """Train for one round from the given weights and save the optimizer state; None if the round is outdated.

        Args:
            current: index of the round, counted from 0.
            weights: averaged weights that the round starts from.
            on_heartbeat: called after each step.
            outdated: asked before each step whether to leave the round.

        Raises:
            TrainingError: some trained weights are not finite; nothing of the round is saved.
        """
        start = time.perf_counter()
        meter = Meter()
        requested = self._requested_signals(meter)
        signals = requested or self._kept_signals(meter)
        meter.add("weights_down", nbytes(weights))
        trainer = self._resumed(current, weights, meter)
        monitor = DiagnosticsMonitor(self._objective, len(self._teacher.tokenizer))
        loss = distillation_loss(
            self._segment,
            self._objective,
            signals,
            self._head,
            self._embedding,
            self._extras,
            self._shard.pairs,
            monitor,
        )
        steps: list[Step] = []
        with torch_threads(self._threads):
            self._prefetch(requested, trainer.step_index)
            for _ in range(self._recipe.rounds.steps):
                if outdated():
                    _LOG.warning("round %d is over, left at step %d", current + 1, len(steps))
                    return None
                micro_batches = self._micro_batches(trainer.step_index)
                if len(steps) + 1 < self._recipe.rounds.steps:
                    self._prefetch(requested, trainer.step_index + 1)
                monitor.begin(trainer.step_index)
                steps.append(trainer.step(micro_batches, loss))
                tokens = sum(step.tokens for step in steps)
                seconds = time.perf_counter() - start
                on_heartbeat(Heartbeat(current, len(steps), steps[-1].loss, tokens / seconds, os.getpid()))
        trainable = {name: tensor.cpu() for name, tensor in trainable_weights(self._model).items()}
        if not all_finite(trainable):  # the next round starts with the optimizer state of the last finite round
            raise TrainingError(NOT_FINITE)
        self._save(current, trainer)
        self._through = current
        meter.add("weights_up", nbytes(trainable))
        tokens = sum(step.tokens for step in steps)
        diagnostics = monitor.report(self._data_diagnostics)
        _LOG.info("round %d: %d steps in %.1f s", current + 1, len(steps), time.perf_counter() - start)
        return StudentUpdate(
            self._edge.name, current, trainable, tokens, steps, time.perf_counter() - start, meter, diagnostics
        )

    def _requested_signals(self, meter: Meter) -> RequestedSignals | None:
        """Return the signals that the teacher computes on request; None if they are kept in a folder."""
        if self._recipe.teacher.signals is None or not self._objective.kd_weight:
            return self._teacher.signals(meter)
        return None

    def _kept_signals(self, meter: Meter) -> SignalStore:
        recipe = self._recipe
        if self._kept is None:
            source = signal_source(recipe, self._teacher.name, self._teacher.tokenizer)
            self._kept = FileSignals(str(recipe.teacher.signals), source)
        return MeteredSignals(self._kept, meter)

    def _prefetch(self, signals: RequestedSignals | None, step: int) -> None:
        """Request the signals of a step's batches ahead of it, if the teacher computes them on request."""
        if self._objective.kd_weight and signals is not None:
            for micro_batch in self._micro_batches(step):
                signals.prefetch(micro_batch.teacher_batch)

    def _micro_batches(self, step: int) -> list[DistillMicroBatch]:
        """Return the micro-batches of a global step, a pure function of the step."""
        accumulate = self._recipe.training.gradient_accumulation_steps
        return [self._shard.micro_batch(self._order.indices(step * accumulate + micro)) for micro in range(accumulate)]

    def _resumed(self, current: int, weights: Weights, meter: Meter) -> Trainer:
        """Return the trainer in its state after the previous round, with this round's weights."""
        recipe = self._recipe
        if self._trainer is None:
            frozen: Weights = {}
            student = self._cohort.student
            if student.lora is not None:
                frozen = self._teacher.frozen()
                meter.add("frozen", nbytes(frozen))
            self._model = build_student(self._config, weights, frozen, student, self._device).train()
            if recipe.training.gradient_checkpointing:
                self._model.gradient_checkpointing_enable()
            self._segment = Segment(self._model)
            self._fetch(meter)
            # Extra modules such as projectors stay at their edge: they belong to one pair of student and teacher.
            self._extras = self._initial_extras()
            modules = {"student": self._model, **({} if self._extras is None else {"extras": self._extras})}
            self._trainer = Trainer(
                modules,
                recipe.training,
                total_steps=recipe.rounds.count * recipe.rounds.steps,
                seed=recipe.seed,
                lr={"extras": self._objective.extras_lr},
                autocast=compute_dtype(recipe.dtype, self._device),
            )
        if self._through is None or self._through != current - 1:
            # A new process, or an unfinished round before this one: start from the last finished round.
            saved = self._last_before(current)
            self._trainer.optimizer.state.clear()
            if saved:
                self._trainer.load_state({name: one for name, one in saved.items() if not name.startswith(_EXTRAS)})
            if self._extras is not None and (fresh := self._initial_extras()) is not None:
                begun = {name.removeprefix(_EXTRAS): one for name, one in saved.items() if name.startswith(_EXTRAS)}
                self._extras.load_state_dict(begun or fresh.state_dict())
        self._through = None
        load_trainable_weights(self._model, weights)
        # A student that missed a round continues at the step of the others in the schedule.
        self._trainer.step_index = current * recipe.rounds.steps
        return self._trainer

    def _fetch(self, meter: Meter) -> None:
        """Fetch what the objective needs from the teacher once, in addition to signals: head and input embedding."""
        recipe = self._recipe
        if not self._objective.kd_weight or recipe.signal.kind != "hidden":
            return
        head = self._teacher.head()
        meter.add("head", head.nbytes)
        self._head = head.to(self._device, torch.float32)
        if self._objective.needs.teacher_embedding:
            embedding = self._teacher.embedding()
            meter.add("embedding", embedding.nbytes)
            self._embedding = embedding.to(self._device, torch.float32)

    def _initial_extras(self) -> torch.nn.Module | None:
        """Return the initial extra modules of the objective, a function of the seed and the initial models."""
        if self._head is None or not self._objective.needs.extras:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._recipe.seed)
            sizes = ModelSizes(
                self._config.hidden_size,
                self._head.weight.shape[1],
                self._model.get_output_embeddings().weight.detach(),
                self._head.weight,
                None if self._shard.pairs is None else DeviceVocabularyMap(self._shard.pairs.map, self._device),
            )
            made = build_objective(self._objective.kd).extras(sizes)
        return None if made is None else made.to(self._device)

    def _save(self, current: int, trainer: Trainer) -> None:
        """Save this round's state and keep the two before: only the driver knows which one a resumed run needs.

        The driver's latest checkpoint is of this round or the previous one; if that is damaged, it is one round older.
        """
        folder = self._file(current).parent
        extras = {} if self._extras is None else self._extras.state_dict()
        state = {**trainer.state(), **{f"{_EXTRAS}{name}": one.contiguous() for name, one in extras.items()}}
        write_folder(folder, lambda to: save_file(state, to / self._file(current).name))
        before = [number for number in self._saved() if number < current]
        for number in sorted(before)[:-2]:
            remove(self._file(number).parent)

    def _last_before(self, current: int) -> dict[str, Tensor]:
        """Return the state after the last finished round that can be read; empty where there is none."""
        for number in sorted((number for number in self._saved() if number < current), reverse=True):
            try:
                verify(self._file(number).parent)
                return load_file(self._file(number))
            except (ChecksumError, OSError, SafetensorError) as error:
                _LOG.warning("optimiser state of round %d left out: %s", number + 1, str(error).splitlines()[0])
        return {}

    def _saved(self) -> list[int]:
        return [int(folder.name.removeprefix("round-")) for folder in self._folder.glob("round-*")]

    def _file(self, number: int) -> Path:
        return self._folder / f"round-{number:04d}" / "optimizer.safetensors"
