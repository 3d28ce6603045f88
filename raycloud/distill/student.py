"""Students: which blocks they keep, how they are made and checked, and the loss with which they learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raycloud.data.batches import Batch, Sample, length_sorted_batches
from raycloud.distill.alignment.pairs import AlignedSamples, DeviceVocabularyMap
from raycloud.distill.diagnostics import DiagnosticsMonitor
from raycloud.distill.objective import StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objective_options import OPTIONS
from raycloud.distill.recipe import ObjectiveRecipe, StudentRecipe
from raycloud.distill.signals import FrozenHead, SignalStore
from raycloud.errors import ModelError
from raycloud.models.devices import Device
from raycloud.models.loading import Pretrained, load, load_tokenizer, resolve
from raycloud.models.segments import Segment
from raycloud.models.structure import blocks_of
from raycloud.models.surgery.extraction import extract
from raycloud.models.surgery.importance import angular_distances, evenly_spaced, most_important
from raycloud.models.texts import save_end_ids
from raycloud.models.weights import Weights, build
from raycloud.training.loop import Loss
from raycloud.training.lora import add_adapters, load_trainable_weights

_CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class DistillMicroBatch:
    """A micro-batch, and the same texts in the teacher's tokens if the tokenizers differ."""

    batch: Batch
    teacher_batch: Batch
    sample_indices: tuple[int, ...]
    """Sample indices in the data set."""

    @property
    def targets(self) -> int:
        """Number of labelled positions of the student."""
        return self.batch.targets


def differing_tokenizer(recipe: StudentRecipe, teacher: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """Tokenizer of the students; None if it has the same tokens and ids as the teacher's.

    Tokenizers that differ only in which special token is EOS count as the same: base and instruct models of one family
    differ in that.

    Raises:
        ModelError: the tokenizer cannot be loaded.
        DataError: the bytes of its tokens cannot be determined.
    """
    if recipe.model is None:
        return None
    own = load_tokenizer(resolve(recipe.model))
    return None if own.get_vocab() == teacher.get_vocab() else own


def check_objective(objective: ObjectiveRecipe, two_tokenizers: bool) -> None:
    """Check that an objective supports a student with its own tokenizer, or with the teacher's.

    Raises:
        ModelError: it does not.
    """
    name, tokenizers = objective.kd.name, objective.needs.tokenizers
    if two_tokenizers and tokenizers == "one":
        others = ", ".join(other for other, options in OPTIONS.items() if options.requires.tokenizers != "one")
        raise ModelError(f"objective.kd '{name}' needs one tokenizer, student.model has its own; allowed: {others}")
    if not two_tokenizers and tokenizers == "two":
        raise ModelError(f"objective.kd '{name}' is for two tokenizers, the student has the teacher's; take forward_kl")


def initial_student(
    teacher: Pretrained,
    recipe: StudentRecipe,
    calibration: Callable[[PreTrainedTokenizerBase], Sequence[Sample]],
    device: Device,
) -> tuple[PreTrainedModel, list[int] | None]:
    """Build the model that students start from, in float32, and the indices of the blocks it keeps; None if
    ``student.model`` is used whole.

    Args:
        teacher: source of the blocks, unless the recipe names another model.
        recipe: recipe of the student.
        calibration: returns calibration text in the tokens of a tokenizer.
        device: device on which another model is loaded.

    Raises:
        ModelError: the recipe asks for blocks that the model does not have.
    """
    source = teacher if recipe.model is None else load(recipe.model, device=device, dtype="float32")
    source.model.config.architectures = [type(source.model).__name__]
    save_end_ids(source.model, source.tokenizer)
    total = len(blocks_of(source.model))
    check_blocks(recipe, total)
    if recipe.blocks is None and source is not teacher:
        return source.model, None
    blocks = _select_blocks(source, recipe, calibration, total)
    return extract(source.model, blocks).float(), blocks


def build_student(
    config: PretrainedConfig, weights: Weights, frozen: Weights, recipe: StudentRecipe, device: torch.device
) -> PreTrainedModel:
    """Build a student in float32, with adapters if the recipe has them.

    Args:
        config: configuration of the model.
        weights: the trained weights.
        frozen: weights beneath the adapters; unused without adapters.
        recipe: recipe of the student.
        device: device of the result.
    """
    if recipe.lora is None:
        return build(config, weights, device=device, dtype=torch.float32)
    model = add_adapters(build(config, frozen, device=device, dtype=torch.float32), recipe.lora, seed=0)
    load_trainable_weights(model, weights)
    return model.eval()


def check_vocabulary(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """Check that a student with the teacher's tokenizer has the teacher's vocabulary size.

    Raises:
        ModelError: it does not.
    """
    size, allowed = student.vocab_size, teacher.vocab_size
    if size != allowed:
        raise ModelError(f"student.model has a vocabulary of {size} entries; allowed: the teacher's, {allowed}")


def check_blocks(recipe: StudentRecipe, total: int) -> None:
    """Check that a model with ``total`` blocks has the blocks that a recipe asks for.

    Raises:
        ModelError: it does not.
    """
    if isinstance(recipe.blocks, int):
        if not 1 <= recipe.blocks <= total:
            raise ModelError(f"student.blocks is {recipe.blocks}; allowed: 1 to {total}, the model's blocks")
    elif recipe.blocks is not None and (not recipe.blocks or max(recipe.blocks) >= total):
        raise ModelError(f"student.blocks is {recipe.blocks}; allowed: a list of blocks from 0 to {total - 1}")


def named_blocks(recipe: StudentRecipe, total: int) -> list[int] | None:
    """Blocks of a model with ``total`` blocks that a recipe determines; None if they are chosen by a measurement."""
    if not isinstance(recipe.blocks, int):
        return list(range(total)) if recipe.blocks is None else recipe.blocks
    return evenly_spaced(total, recipe.blocks) if recipe.choose == "spacing" else None


def _select_blocks(
    source: Pretrained,
    recipe: StudentRecipe,
    calibration: Callable[[PreTrainedTokenizerBase], Sequence[Sample]],
    total: int,
) -> list[int]:
    if (named := named_blocks(recipe, total)) is not None:
        return named
    assert isinstance(recipe.blocks, int)
    model = source.model
    samples = calibration(source.tokenizer)
    batches = length_sorted_batches(samples, _CALIBRATION_BATCH, source.tokenizer.pad_token_id)
    batches_here = (batch.to(model.device) for batch in batches)
    return most_important(angular_distances(model, ((batch.ids, batch.valid) for batch in batches_here)), recipe.blocks)


def distillation_loss(
    student: Segment,
    objective: ObjectiveRecipe,
    signals: SignalStore,
    teacher_head: FrozenHead | None,
    teacher_embedding: Tensor | None = None,
    extras: nn.Module | None = None,
    pairs: AlignedSamples | None = None,
    monitor: DiagnosticsMonitor | None = None,
) -> Callable[[DistillMicroBatch], Loss]:
    """Loss function of a micro-batch: the student's outputs against the teacher's signal for the same texts.

    Args:
        student: whole model with its head.
        objective: weights and objective.
        signals: source of the teacher's signals.
        teacher_head: required for hidden signals.
        teacher_embedding: input embedding (W, D) of the teacher, for objectives that use token embeddings.
        extras: module that the objective trains beside the student.
        pairs: the data set in the tokens of both models; None if they use one tokenizer.
        monitor: measures diagnostics on the way.
    """
    device = next(student.parameters()).device
    weighted = objective.weighted()
    vocabulary = None if pairs is None else DeviceVocabularyMap(pairs.map, device)
    modules: dict[str, nn.Module] = {} if extras is None else {objective.kd.name: extras}

    def teacher_output(micro_batch: DistillMicroBatch, output: StudentOutput) -> TeacherOutput:
        signal = signals.signal(micro_batch.teacher_batch).to(device)
        if pairs is None or vocabulary is None:
            return TeacherOutput(signal, teacher_head, ids=output.ids, embedding=teacher_embedding)
        return pairs.output(micro_batch.sample_indices, signal, teacher_head, vocabulary, teacher_embedding)

    def loss(micro_batch: DistillMicroBatch) -> Loss:
        output = StudentOutput.of(student, micro_batch.batch.to(device))
        teacher = teacher_output(micro_batch, output) if objective.kd_weight else None
        found = weighted_sum(weighted, output, teacher, modules)
        if monitor is not None:
            monitor.observe(output, teacher, modules)
        return found

    return loss
