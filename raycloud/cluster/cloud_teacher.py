"""Teacher in the cloud: a thin actor around pure functions of ``raycloud.distill``."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import ray
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import threads_per_actor
from raycloud.data.batches import Batch, Sample, encode
from raycloud.data.fingerprint import data_sources, fingerprints
from raycloud.data.prompts import bounds_of
from raycloud.data.sources import held_out_part, training_rows
from raycloud.data.splits import Row, evenly_spread_indices
from raycloud.distill.evaluation import CompletionComparison, StudentEvaluation, StudentEvaluator
from raycloud.distill.recipe import Cohort, DistillRecipe
from raycloud.distill.shard import Shard, signal_source
from raycloud.distill.signals import FrozenHead, Signal, compute_signal, frozen_head, signal_key
from raycloud.distill.signals.file import build_signals, tokenizer_fingerprint
from raycloud.distill.student import build_student, differing_tokenizer, initial_student
from raycloud.errors import ClusterError
from raycloud.models.configuration import context_length
from raycloud.models.loading import Pretrained, load, pick_device
from raycloud.models.segments import Segment
from raycloud.models.threads import torch_threads
from raycloud.models.weights import Weights, build, fingerprint, weights_of
from raycloud.origin import cores
from raycloud.results import cached_json
from raycloud.training.lora import add_adapters, merge_adapters, trainable_weights
from raycloud.training.precision import autocast_to, compute_dtype

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherInfo:
    """Facts about the teacher that the job needs: name with fingerprint, tokenizer, number of parameters."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    parameters: int
    head_shape: tuple[int, int] | None
    """Size of the vocabulary and hidden size at the head; None if the head is not one linear map."""
    positions: int
    """Largest number of tokens of a text."""


@dataclass(frozen=True)
class InitialStudent:
    """Model that the students of a cohort start from.

    ``blocks`` are the blocks it keeps of the teacher, or of ``student.model``; None if that is used whole.
    """

    config: PretrainedConfig
    weights: dict
    blocks: list[int] | None


@dataclass(frozen=True)
class ModelEvaluation:
    """Evaluation of a model; ``rouge_l`` (%) is None where no answers were generated."""

    evaluation: StudentEvaluation
    rouge_l: float | None


class CloudTeacher:
    """Actor that holds the teacher. Every method is idempotent: calling it again gives the same result.

    Signals are put into the object store once per batch; students that request the same ids share the object.

    Args:
        recipe: whole distillation recipe.
        log: log of the run; None for none.
    """

    SHARED_BYTES = 1 << 29
    """Maximum size in bytes of the signals kept in the object store for students that have not requested them yet."""

    def __init__(self, recipe: DistillRecipe, log: RunLog | None = None) -> None:
        if log is not None:
            log.attach()
        self._recipe = recipe
        self._shared: OrderedDict[str, tuple[ray.ObjectRef, int]] = OrderedDict()
        self._shared_bytes = 0
        self._evaluators: dict[str | None, StudentEvaluator] = {}
        self._origins: dict[str, InitialStudent] = {}

    def prepare(self) -> TeacherInfo:
        """Load the model and return the facts about it."""
        model, head = self._teacher.model, self._segment.head
        shape = None
        if isinstance(head, torch.nn.Linear):
            shape = head.out_features, head.in_features
        parameters, length = model.num_parameters(), context_length(model.config)
        return TeacherInfo(self._name, self._teacher.tokenizer, parameters, shape, length)

    @cached_property
    def _teacher(self) -> Pretrained:
        # On a CPU the weights stay float32, for exact evaluations; signals are computed under autocast.
        recipe = self._recipe
        dtype = "float32" if pick_device(recipe.device).type == "cpu" else recipe.dtype
        loaded = load(recipe.teacher.model, device=recipe.device, dtype=dtype)
        _LOG.info("loaded '%s', process %d", recipe.teacher.model, os.getpid())
        return loaded

    @cached_property
    def _segment(self) -> Segment:
        return Segment(self._teacher.model)

    @cached_property
    def _name(self) -> str:
        return f"{self._recipe.teacher.model}@{fingerprint(weights_of(self._teacher.model))}"

    def head(self) -> FrozenHead:
        """Return a copy of the head, encoded as for the link, for ``hidden`` signals."""
        return frozen_head(self._segment, self._recipe.signal.codec)

    def embedding(self) -> Tensor:
        """Return the input embedding (V, d) in bfloat16, for objectives that use the teacher's token embeddings."""
        table = self._teacher.model.get_input_embeddings()
        assert isinstance(table, torch.nn.Embedding)
        return table.weight.detach().to(torch.bfloat16).cpu()

    def signal(self, name: str, batch: Batch) -> list[ray.ObjectRef]:
        """Return a one-element list with a reference to the teacher's signal of a batch.

        Raises:
            ClusterError: ``name`` is not the name of this replica's teacher, so its weights differ.
        """
        recipe, device = self._recipe, self._teacher.model.device
        if name != self._name:
            raise ClusterError(f"asked for signals of the teacher '{name}', this is '{self._name}'")
        key = signal_key(name, batch, recipe.signal, recipe.temperatures)
        if key in self._shared:
            self._shared.move_to_end(key)
        else:
            # Students train while this runs; where they share its node, it takes one student's share of the cores.
            threads = threads_per_actor(recipe.threads, "edge", len(recipe.edges) - len(recipe.devices))
            with torch_threads(threads), autocast_to(compute_dtype(recipe.dtype, device), device):
                signal = compute_signal(self._segment, name, batch.to(device), recipe.signal, recipe.temperatures)
            self._share(key, signal)
        return [self._shared[key][0]]

    def _share(self, key: str, signal: Signal) -> None:
        self._shared[key] = (ray.put(signal), signal.nbytes)
        self._shared_bytes += signal.nbytes
        while self._shared_bytes > self.SHARED_BYTES and len(self._shared) > 1:
            _, (_, size) = self._shared.popitem(last=False)
            self._shared_bytes -= size

    @ray.method(num_returns="streaming")
    def fill_signals_dir(self) -> Iterator[tuple[int, int]]:
        """Fill the recipe's folder of signals for all edges; yield (samples done, samples in all).

        If several replicas are called, the second one finds the work done.
        """
        recipe, device = self._recipe, self._teacher.model.device
        samples = {
            sample: None
            for edge in recipe.edges
            if recipe.cohort_of(edge).objective.kd_weight and not edge.device
            for sample in Shard.of(recipe, edge, self._teacher.tokenizer).teacher_samples
        }
        with torch_threads(cores()), autocast_to(compute_dtype(recipe.dtype, device), device):
            source = signal_source(recipe, self._name, self._teacher.tokenizer)
            yield from build_signals(str(recipe.teacher.signals), source, self._segment, list(samples))

    def start(self, cohort: str) -> InitialStudent:
        """Return the initial model of a cohort; a cohort that trains adapters has fresh adapters as its weights."""
        lora = self._cohort(cohort).student.lora
        if lora is None:
            return self._whole_student(cohort)
        origin = self._origin(cohort)
        bare = build(origin.config, origin.weights, device=torch.device("cpu"), dtype=torch.float32)
        return InitialStudent(
            origin.config, trainable_weights(add_adapters(bare, lora, self._recipe.seed)), origin.blocks
        )

    def frozen(self, cohort: str) -> Weights:
        """Return the frozen weights under a cohort's adapters; empty where it trains all weights."""
        return {} if self._cohort(cohort).student.lora is None else self._origin(cohort).weights

    def _origin(self, cohort: str) -> InitialStudent:
        """Return the initial whole student, cached for students that restart and for evaluations."""
        if cohort not in self._origins:
            self._origins[cohort] = self._whole_student(cohort)
        return self._origins[cohort]

    def _whole_student(self, cohort: str) -> InitialStudent:
        recipe, student = self._recipe, self._cohort(cohort).student

        def calibration(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
            rows = training_rows(recipe.data)
            chosen = [rows[index] for index in evenly_spread_indices(len(rows), student.calibration)]
            limits = {"max_length": recipe.data.max_length, "max_prompt_length": recipe.data.max_prompt_length}
            return encode(chosen, tokenizer, recipe.data.format, **limits, bos=recipe.data.bos)

        with torch_threads(cores()):
            model, blocks = initial_student(self._teacher, student, calibration, recipe.device)
        return InitialStudent(model.config, {name: tensor.cpu() for name, tensor in weights_of(model).items()}, blocks)

    def _cohort(self, name: str) -> Cohort:
        return next(cohort for cohort in self._recipe.cohorts if cohort.name == name)

    @cached_property
    def _held_out(self) -> list[Row]:
        return held_out_part(self._recipe.data, self._recipe.evaluation.split)

    def _evaluator(self, cohort: str) -> StudentEvaluator:
        """Return the cohort's evaluator; cohorts with the same tokenizer share one."""
        own = differing_tokenizer(self._cohort(cohort).student, self._teacher.tokenizer)
        vocabulary = None if own is None else tokenizer_fingerprint(own)
        if vocabulary not in self._evaluators:
            recipe, data = self._recipe.evaluation, self._recipe.data
            groups: dict[str, list[Row]] = {}
            for row in self._held_out:
                groups.setdefault(str(row[recipe.by]) if recipe.by else "held-out", []).append(row)
            held_out = {
                group: [rows[index] for index in evenly_spread_indices(len(rows), recipe.held_out_samples)]
                for group, rows in sorted(groups.items())
            }
            cache = self._recipe.teacher.signals
            self._evaluators[vocabulary] = StudentEvaluator(
                self._teacher,
                own,
                held_out,
                data.format,
                max_length=data.max_length,
                max_prompt_length=data.max_prompt_length,
                bos=data.bos,
                cache=None if cache is None else Path(cache) / "held_out",
                name=self._name,
            )
        return self._evaluators[vocabulary]

    def evaluate_teacher(self, cohort: str) -> ModelEvaluation:
        """Evaluate the teacher on the held-out text of a cohort.

        Rows that one of the two tokenizers cannot encode are left out.
        """
        with torch_threads(cores()):
            evaluator = self._evaluator(cohort)
            return ModelEvaluation(StudentEvaluation(evaluator.evaluate_teacher(), []), self._rouge_l(evaluator, None))

    def scores(
        self, cohort: str, config: PretrainedConfig, weights: Weights, *, answer: bool = True
    ) -> ModelEvaluation:
        """Evaluate a student on held-out text; with ``answer=False`` no answers are generated."""
        with torch_threads(cores()):
            evaluator, model = self._evaluator(cohort), self._built(cohort, config, weights)
            return ModelEvaluation(
                evaluator.evaluate_student(model), self._rouge_l(evaluator, model) if answer else None
            )

    def _rouge_l(self, evaluator: StudentEvaluator, model: PreTrainedModel | None) -> float | None:
        """Return ROUGE-L (%) of generated answers; None without ``evaluation.answers``.

        Runs that share a folder of signals share this cache, since most start from the same teacher and student.
        """
        recipe, how = self._recipe, self._recipe.evaluation
        if not how.answers:
            return None

        def ask() -> float:
            return evaluator.rouge_l(model, self._held_out, how.answers, how.generation, recipe.seed)

        if recipe.teacher.signals is None:
            return ask()
        tokenizer, data = evaluator.tokenizer(model), recipe.data
        about = {
            "weights": fingerprint(weights_of(model or self._teacher.model)),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "texts": asdict(bounds_of(tokenizer, data.format, data.bos)),
            "data": data.model_dump(mode="json"),
            "inputs": fingerprints(data_sources(data)),
            "split": how.split,
            "answers": how.answers,
            "generation": how.generation.model_dump(mode="json"),
            # Greedy answers do not depend on the seed.
            "seed": recipe.seed if how.generation.temperature else None,
        }
        found: float = cached_json(Path(recipe.teacher.signals) / "rouge_l", about, ask)
        return found

    def compare(self, cohort: str, config: PretrainedConfig, weights: Weights) -> CompletionComparison:
        """Compare teacher and student: completions of prompts, and generation speed."""
        recipe = self._recipe.evaluation
        with torch_threads(cores()):
            student = self._built(cohort, config, weights)
            return self._evaluator(cohort).compare(student, recipe.prompts, recipe.max_new_tokens)

    def _built(self, cohort: str, config: PretrainedConfig, weights: Weights) -> PreTrainedModel:
        student, device = self._cohort(cohort).student, pick_device(self._recipe.device)
        if student.lora is not None:
            weights = weights_of(merge_adapters(build_student(config, weights, self.frozen(cohort), student, device)))
        return build(config, weights, device=device, dtype=self._teacher.model.dtype)
