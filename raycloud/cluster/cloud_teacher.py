"""The teacher in the cloud, as a thin actor around pure functions of ``raycloud.distill``."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import ray
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raycloud.cluster.runtime import computing_with, share_of_cores
from raycloud.data.batches import Batch, Sample, encode
from raycloud.data.sources import load_rows
from raycloud.data.splits import Row, spread
from raycloud.distill.examination import Comparison, Examiner, Score
from raycloud.distill.recipe import DistillRecipe
from raycloud.distill.signals import FrozenHead, Signal, frozen_head, observe, signal_key
from raycloud.distill.student import initial_student, own_tokenizer, student_from
from raycloud.errors import ClusterError
from raycloud.models.loading import Pretrained, load, pick_device
from raycloud.models.segments import Segment
from raycloud.models.weights import Weights, build, fingerprint, weights_of
from raycloud.training.lora import attach, learnt_weights, merge
from raycloud.training.precision import compute_type, computing_in


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


class CloudTeacher:
    """Holds the teacher and answers for it; every method may be called again with the same outcome.

    Signals are put into the object store once per batch; students that ask for the same ids share the object.
    """

    SHARED_BYTES = 1 << 29
    """Signals that are kept in the object store for students still to ask for them."""

    def __init__(self, recipe: DistillRecipe) -> None:
        self._recipe = recipe
        self._shared: OrderedDict[str, tuple[ray.ObjectRef, int]] = OrderedDict()
        self._shared_bytes = 0

    def prepare(self) -> TeacherFacts:
        """Load the model."""
        return TeacherFacts(self._name, self._teacher.tokenizer, self._teacher.model.num_parameters())

    @cached_property
    def _teacher(self) -> Pretrained:
        # On a CPU the weights stay float32, for exact examinations; signals are computed under autocast.
        recipe = self._recipe
        dtype = "float32" if pick_device(recipe.device).type == "cpu" else recipe.dtype
        return load(recipe.teacher.model, device=recipe.device, dtype=dtype)

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
        temperatures = [recipe.objective.kd.temperature]
        key = signal_key(name, batch, recipe.signal, temperatures)
        if key in self._shared:
            self._shared.move_to_end(key)
        else:
            # Students train while this runs; where they share its node, it takes one student's share of the cores.
            threads = share_of_cores(recipe.threads, "edge", len(recipe.edges))
            with computing_with(threads), computing_in(compute_type(recipe.dtype, device), device):
                said = observe(self._segment, name, batch.to(device), recipe.signal, temperatures)
            self._share(key, said)
        return [self._shared[key][0]]

    def _share(self, key: str, said: Signal) -> None:
        self._shared[key] = (ray.put(said), said.nbytes)
        self._shared_bytes += said.nbytes
        while self._shared_bytes > self.SHARED_BYTES and len(self._shared) > 1:
            _, (_, size) = self._shared.popitem(last=False)
            self._shared_bytes -= size

    def start(self) -> Start:
        """The model that students start from; where they train adapters, fresh ones are all its weights."""
        recipe = self._recipe
        if recipe.student.lora is None:
            return self._whole_student()
        config, frozen, blocks = self._origin.config, self._origin.weights, self._origin.blocks
        bare = build(config, frozen, device=torch.device("cpu"), dtype=torch.float32)
        return Start(config, learnt_weights(attach(bare, recipe.student.lora, recipe.seed)), blocks)

    def frozen(self) -> Weights:
        """The weights that students put adapters on; none where they train everything."""
        return {} if self._recipe.student.lora is None else self._origin.weights

    @cached_property
    def _origin(self) -> Start:
        """Kept for students that come back, and for examinations."""
        return self._whole_student()

    def _whole_student(self) -> Start:
        recipe = self._recipe
        with computing_with(os.cpu_count() or 1):
            rows = load_rows(recipe.data.source, "train")
            calibration = self._encode([rows[place] for place in spread(len(rows), recipe.student.calibration)])
            student, blocks = initial_student(self._teacher, recipe.student, calibration, recipe.device)
        return Start(student.config, {name: tensor.cpu() for name, tensor in weights_of(student).items()}, blocks)

    def _encode(self, rows: Sequence[Row]) -> list[Sample]:
        data = self._recipe.data
        return encode(
            rows, self._teacher.tokenizer, data.format, max_length=data.max_length, max_prompt=data.max_prompt
        )

    @cached_property
    def _examination(self) -> Examiner:
        recipe = self._recipe.evaluation
        groups: dict[str, list[Row]] = {}
        for row in load_rows(self._recipe.data.source, recipe.split):
            groups.setdefault(str(row[recipe.by]) if recipe.by else "held-out", []).append(row)
        data = self._recipe.data
        held_out = {
            group: [rows[place] for place in spread(len(rows), recipe.samples)]
            for group, rows in sorted(groups.items())
        }
        own = own_tokenizer(self._recipe.student, self._teacher.tokenizer)
        return Examiner(
            self._teacher, own, held_out, data.format, max_length=data.max_length, max_prompt=data.max_prompt
        )

    def teacher_scores(self) -> dict[str, Score]:
        """The teacher on held-out text, by group and over all."""
        with computing_with(os.cpu_count() or 1):
            return self._examination.teacher()

    def scores(self, config: PretrainedConfig, weights: Weights) -> dict[str, Score]:
        """A student on held-out text, by group and over all."""
        with computing_with(os.cpu_count() or 1):
            return self._examination.student(self._built(config, weights))

    def compare(self, config: PretrainedConfig, weights: Weights) -> Comparison:
        """Prompts completed by both, and both speeds."""
        recipe = self._recipe.evaluation
        with computing_with(os.cpu_count() or 1):
            return self._examination.compare(self._built(config, weights), recipe.prompts, recipe.new_tokens)

    def _built(self, config: PretrainedConfig, weights: Weights) -> PreTrainedModel:
        recipe, device = self._recipe, pick_device(self._recipe.device)
        if recipe.student.lora is not None:
            weights = weights_of(merge(student_from(config, weights, self.frozen(), recipe.student, device)))
        return build(config, weights, device=device, dtype=self._teacher.model.dtype)
