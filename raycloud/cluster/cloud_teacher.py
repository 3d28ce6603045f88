"""The teacher in the cloud, as a thin actor around pure functions of ``raycloud.distill``."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ray
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raycloud.cluster.run_log import RunLog
from raycloud.cluster.runtime import computing_with, cores, share_of_cores
from raycloud.data.batches import Batch, Sample, encode
from raycloud.data.sources import load_rows, training_rows
from raycloud.data.splits import Row, spread
from raycloud.distill.examination import Comparison, Examined, Examiner
from raycloud.distill.recipe import Cohort, DistillRecipe
from raycloud.distill.shard import Shard, origin_of
from raycloud.distill.signal_file import building, tokenizer_fingerprint
from raycloud.distill.signals import FrozenHead, Signal, frozen_head, observe, signal_key
from raycloud.distill.student import initial_student, own_tokenizer, student_from
from raycloud.errors import ClusterError
from raycloud.models.loading import Pretrained, load, pick_device
from raycloud.models.segments import Segment
from raycloud.models.weights import Weights, build, fingerprint, weights_of
from raycloud.results import kept_json
from raycloud.training.lora import attach, learnt_weights, merge
from raycloud.training.precision import compute_type, computing_in

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherFacts:
    """What the job needs to know about the teacher."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    parameters: int


@dataclass(frozen=True)
class Start:
    """The model that students start from."""

    config: PretrainedConfig
    weights: dict
    blocks: list[int] | None


@dataclass(frozen=True)
class Findings:
    """An examination, and ROUGE-L (%) of the answers where any were asked for."""

    examined: Examined
    rouge_l: float | None


class CloudTeacher:
    """Holds the teacher and answers for it; every method may be called again with the same outcome.

    Signals are put into the object store once per batch; students that ask for the same ids share the object.

    Args:
        recipe: the whole recipe.
        log: the run's; None for none.
    """

    SHARED_BYTES = 1 << 29
    """Signals that are kept in the object store for students still to ask for them."""

    def __init__(self, recipe: DistillRecipe, log: RunLog | None = None) -> None:
        if log is not None:
            log.attach()
        self._recipe = recipe
        self._shared: OrderedDict[str, tuple[ray.ObjectRef, int]] = OrderedDict()
        self._shared_bytes = 0
        self._examiners: dict[str | None, Examiner] = {}
        self._origins: dict[str, Start] = {}

    def prepare(self) -> TeacherFacts:
        """Load the model."""
        return TeacherFacts(self._name, self._teacher.tokenizer, self._teacher.model.num_parameters())

    @cached_property
    def _teacher(self) -> Pretrained:
        # On a CPU the weights stay float32, for exact examinations; signals are computed under autocast.
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
        """A copy of the head as it crosses the link, for ``hidden`` signals."""
        return frozen_head(self._segment, self._recipe.signal.codec)

    def words(self) -> Tensor:
        """The input embedding (W, D) as it crosses the link, for objectives that look at the tokens themselves."""
        embedding = self._teacher.model.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)
        return embedding.weight.detach().to(torch.bfloat16).cpu()

    def signal(self, name: str, batch: Batch) -> list[ray.ObjectRef]:
        """The one-element list of a reference to what the teacher says about a batch.

        Raises:
            ClusterError: this replica's weights are not those of the teacher called ``name``.
        """
        recipe, device = self._recipe, self._teacher.model.device
        if name != self._name:
            raise ClusterError(f"asked for signals of the teacher '{name}', this is '{self._name}'")
        key = signal_key(name, batch, recipe.signal, recipe.temperatures)
        if key in self._shared:
            self._shared.move_to_end(key)
        else:
            # Students train while this runs; where they share its node, it takes one student's share of the cores.
            threads = share_of_cores(recipe.threads, "edge", len(recipe.edges))
            with computing_with(threads), computing_in(compute_type(recipe.dtype, device), device):
                said = observe(self._segment, name, batch.to(device), recipe.signal, recipe.temperatures)
            self._share(key, said)
        return [self._shared[key][0]]

    def _share(self, key: str, said: Signal) -> None:
        self._shared[key] = (ray.put(said), said.nbytes)
        self._shared_bytes += said.nbytes
        while self._shared_bytes > self.SHARED_BYTES and len(self._shared) > 1:
            _, (_, size) = self._shared.popitem(last=False)
            self._shared_bytes -= size

    @ray.method(num_returns="streaming")
    def keep_signals(self) -> Iterator[tuple[int, int]]:
        """Fill the recipe's folder of signals for all edges; yields how many of how many samples are there.

        Where several replicas are asked, the one that comes second finds the work done.
        """
        recipe, device = self._recipe, self._teacher.model.device
        samples = {
            sample: None
            for edge in recipe.edges
            if recipe.cohort_of(edge).objective.kd_weight
            for sample in Shard.of(recipe, edge, self._teacher.tokenizer).asked
        }
        with computing_with(cores()), computing_in(compute_type(recipe.dtype, device), device):
            origin = origin_of(recipe, self._name, self._teacher.tokenizer)
            yield from building(str(recipe.teacher.signals), origin, self._segment, list(samples))

    def start(self, cohort: str) -> Start:
        """The model that a cohort starts from; where it trains adapters, fresh ones are all its weights."""
        lora = self._cohort(cohort).student.lora
        if lora is None:
            return self._whole_student(cohort)
        origin = self._origin(cohort)
        bare = build(origin.config, origin.weights, device=torch.device("cpu"), dtype=torch.float32)
        return Start(origin.config, learnt_weights(attach(bare, lora, self._recipe.seed)), origin.blocks)

    def frozen(self, cohort: str) -> Weights:
        """The weights that a cohort puts adapters on; none where it trains everything."""
        return {} if self._cohort(cohort).student.lora is None else self._origin(cohort).weights

    def _origin(self, cohort: str) -> Start:
        """Kept for students that come back, and for examinations."""
        if cohort not in self._origins:
            self._origins[cohort] = self._whole_student(cohort)
        return self._origins[cohort]

    def _whole_student(self, cohort: str) -> Start:
        recipe, student = self._recipe, self._cohort(cohort).student

        def calibration(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
            rows = training_rows(recipe.data)
            chosen = [rows[place] for place in spread(len(rows), student.calibration)]
            limits = {"max_length": recipe.data.max_length, "max_prompt": recipe.data.max_prompt}
            return encode(chosen, tokenizer, recipe.data.format, **limits)

        with computing_with(cores()):
            model, blocks = initial_student(self._teacher, student, calibration, recipe.device)
        return Start(model.config, {name: tensor.cpu() for name, tensor in weights_of(model).items()}, blocks)

    def _cohort(self, name: str) -> Cohort:
        return next(cohort for cohort in self._recipe.cohorts if cohort.name == name)

    @cached_property
    def _held_out(self) -> list[Row]:
        return load_rows(self._recipe.data.source, self._recipe.evaluation.split)

    def _examiner(self, cohort: str) -> Examiner:
        """Students with one tokenizer share theirs."""
        own = own_tokenizer(self._cohort(cohort).student, self._teacher.tokenizer)
        words = None if own is None else tokenizer_fingerprint(own)
        if words not in self._examiners:
            recipe, data = self._recipe.evaluation, self._recipe.data
            groups: dict[str, list[Row]] = {}
            for row in self._held_out:
                groups.setdefault(str(row[recipe.by]) if recipe.by else "held-out", []).append(row)
            held_out = {
                group: [rows[place] for place in spread(len(rows), recipe.samples)]
                for group, rows in sorted(groups.items())
            }
            kept = self._recipe.teacher.signals
            self._examiners[words] = Examiner(
                self._teacher,
                own,
                held_out,
                data.format,
                max_length=data.max_length,
                max_prompt=data.max_prompt,
                kept=None if kept is None else Path(kept) / "held_out",
                name=self._name,
            )
        return self._examiners[words]

    def teacher_scores(self, cohort: str) -> Findings:
        """The teacher on the held-out text of a cohort, which may lack rows that one of both cannot read."""
        with computing_with(cores()):
            examiner = self._examiner(cohort)
            return Findings(Examined(examiner.teacher(), []), self._rouge_l(examiner, None))

    def scores(self, cohort: str, config: PretrainedConfig, weights: Weights, *, answer: bool = True) -> Findings:
        """A student on held-out text; without ``answer`` no questions are asked."""
        with computing_with(cores()):
            examiner, model = self._examiner(cohort), self._built(cohort, config, weights)
            return Findings(examiner.student(model), self._rouge_l(examiner, model) if answer else None)

    def _rouge_l(self, examiner: Examiner, model: PreTrainedModel | None) -> float | None:
        """Runs that share a folder of signals share these as well: most begin with the same teacher and student."""
        recipe, how = self._recipe, self._recipe.evaluation
        if not how.answers:
            return None

        def ask() -> float:
            return examiner.rouge_l(model, self._held_out, how.answers, how.generation, recipe.seed)

        if recipe.teacher.signals is None:
            return ask()
        about = {
            "weights": fingerprint(weights_of(model or self._teacher.model)),
            "tokenizer": tokenizer_fingerprint(examiner.tokenizer(model)),
            "data": recipe.data.model_dump(mode="json"),
            "split": how.split,
            "answers": how.answers,
            "generation": how.generation.model_dump(mode="json"),
            # Greedy answers do not depend on it.
            "seed": recipe.seed if how.generation.temperature else None,
        }
        found: float = kept_json(Path(recipe.teacher.signals) / "rouge_l", about, ask)
        return found

    def compare(self, cohort: str, config: PretrainedConfig, weights: Weights) -> Comparison:
        """Prompts completed by both, and both speeds."""
        recipe = self._recipe.evaluation
        with computing_with(cores()):
            student = self._built(cohort, config, weights)
            return self._examiner(cohort).compare(student, recipe.prompts, recipe.new_tokens)

    def _built(self, cohort: str, config: PretrainedConfig, weights: Weights) -> PreTrainedModel:
        student, device = self._cohort(cohort).student, pick_device(self._recipe.device)
        if student.lora is not None:
            weights = weights_of(merge(student_from(config, weights, self.frozen(cohort), student, device)))
        return build(config, weights, device=device, dtype=self._teacher.model.dtype)
