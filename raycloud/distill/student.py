"""Where students start, and how they learn from a signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.data.batches import Batch, Sample, in_length_order
from raycloud.distill.objective import StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.recipe import ObjectiveRecipe, StudentRecipe
from raycloud.distill.signals import FrozenHead, SignalStore
from raycloud.errors import ModelError
from raycloud.models.anatomy import blocks_of
from raycloud.models.loading import Device, Pretrained, load
from raycloud.models.segments import Segment
from raycloud.models.surgery.extraction import extract
from raycloud.models.surgery.importance import angular_distances, evenly_spaced, largest
from raycloud.training.loop import Loss

_CALIBRATION_BATCH = 16


def initial_student(
    teacher: Pretrained, recipe: StudentRecipe, calibration: Sequence[Sample], device: Device
) -> tuple[PreTrainedModel, list[int] | None]:
    """The model that students start from, in float32, and which of the teacher's blocks it has (None if its own).

    Raises:
        ModelError: the recipe asks for blocks the teacher has not, or the vocabularies differ.
    """
    if recipe.model is not None:
        student = load(recipe.model, device=device, dtype="float32").model
        check_vocabulary(student.config, teacher.model.config)
        student.config.architectures = [type(student).__name__]
        return student, None
    total = len(blocks_of(teacher.model))
    check_blocks(recipe, total)
    blocks = _choose(teacher, recipe, calibration, total)
    return extract(teacher.model, blocks).float(), blocks


def check_vocabulary(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """Whether a student has the teacher's vocabulary, which these divergences need.

    Raises:
        ModelError: it has not.
    """
    words, wanted = student.vocab_size, teacher.vocab_size
    if words != wanted:
        raise ModelError(f"student.model has a vocabulary of {words} words; allowed: the teacher's, {wanted}")


def check_blocks(recipe: StudentRecipe, total: int) -> None:
    """Whether a teacher with ``total`` blocks has those a recipe asks for.

    Raises:
        ModelError: it has not.
    """
    if isinstance(recipe.blocks, int):
        if not 1 <= recipe.blocks <= total:
            raise ModelError(f"student.blocks is {recipe.blocks}; allowed: 1 to {total}, the teacher's blocks")
    elif not recipe.blocks or max(recipe.blocks) >= total:
        raise ModelError(f"student.blocks is {recipe.blocks}; allowed: a list of blocks from 0 to {total - 1}")


def _choose(teacher: Pretrained, recipe: StudentRecipe, calibration: Sequence[Sample], total: int) -> list[int]:
    if isinstance(recipe.blocks, list):
        return recipe.blocks
    if recipe.choose == "spacing":
        return evenly_spaced(total, recipe.blocks)
    model = teacher.model
    batches = in_length_order(calibration, _CALIBRATION_BATCH, teacher.tokenizer.pad_token_id)
    places = (batch.to(model.device) for batch in batches)
    return largest(angular_distances(model, ((batch.ids, batch.valid) for batch in places)), recipe.blocks)


def loss_from_signals(
    student: Segment,
    objective: ObjectiveRecipe,
    signals: SignalStore,
    teacher_head: FrozenHead | None,
    teacher_words: Tensor | None = None,
    extras: nn.Module | None = None,
) -> Callable[[Batch], Loss]:
    """The loss of a batch: the student's rows against what the teacher says about the same tokens.

    Args:
        student: with its head.
        objective: what is summed.
        signals: where the teacher's come from.
        teacher_head: for hidden signals.
        teacher_words: the teacher's input embedding (W, D), for objectives that look at the tokens themselves.
        extras: what the objective trains beside the student.
    """
    device = next(student.parameters()).device
    weighted = objective.weighted()

    def loss(batch: Batch) -> Loss:
        output = StudentOutput.of(student, batch.to(device))
        if not objective.kd_weight:
            return weighted_sum(weighted, output)
        signal = signals.signal(batch).to(device)
        teacher = TeacherOutput(signal, teacher_head, ids=output.ids, embedding=teacher_words)
        return weighted_sum(weighted, output, teacher, {} if extras is None else {objective.kd.name: extras})

    return loss
