"""Where students start, and how they learn from a signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from raycloud.data.batches import Batch, Sample, in_length_order
from raycloud.distill.divergence import Divergence
from raycloud.distill.health import Monitor
from raycloud.distill.objective import StudentOutput, TeacherOutput, weighted_sum
from raycloud.distill.objectives import DIVERGENCES, OBJECTIVES
from raycloud.distill.objectives.mined import MinED
from raycloud.distill.pairs import Pairs, Words
from raycloud.distill.recipe import ObjectiveRecipe, StudentRecipe
from raycloud.distill.signals import FrozenHead, SignalStore
from raycloud.errors import ModelError
from raycloud.models.anatomy import blocks_of
from raycloud.models.loading import Device, Pretrained, load, load_tokenizer, resolve
from raycloud.models.segments import Segment
from raycloud.models.surgery.extraction import extract
from raycloud.models.surgery.importance import angular_distances, evenly_spaced, largest
from raycloud.models.weights import Weights, build
from raycloud.training.loop import Loss
from raycloud.training.lora import attach, load_learnt

_CALIBRATION_BATCH = 16


@dataclass(frozen=True)
class Lesson:
    """A micro-batch, and what the teacher is asked about: the same texts, in its own tokens where those differ."""

    batch: Batch
    asked: Batch
    which: tuple[int, ...]
    """Samples of the data set."""

    @property
    def targets(self) -> int:
        """Labelled positions of the student."""
        return self.batch.targets


def own_tokenizer(recipe: StudentRecipe, teacher: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """The students' tokenizer; None where it is the teacher's.

    Raises:
        ModelError: it cannot be loaded.
        DataError: its tokens' bytes are not known.
    """
    if recipe.model is None:
        return None
    own = load_tokenizer(resolve(recipe.model))
    same = own.get_vocab() == teacher.get_vocab() and own.eos_token_id == teacher.eos_token_id
    return None if same else own


def check_objective(objective: ObjectiveRecipe, crossing: bool) -> None:
    """Whether an objective can teach a student with a tokenizer of its own, or with the teacher's.

    Raises:
        ModelError: it cannot.
    """
    if not objective.kd_weight:
        return
    name = objective.kd.name
    if crossing and isinstance(objective.kd, Divergence):
        others = ", ".join(other for other in OBJECTIVES if other not in DIVERGENCES)
        raise ModelError(f"objective.kd '{name}' needs one tokenizer, student.model has its own; allowed: {others}")
    if not crossing and isinstance(objective.kd, MinED):
        raise ModelError(f"objective.kd '{name}' is for two tokenizers, the student has the teacher's; take forward_kl")


def initial_student(
    teacher: Pretrained,
    recipe: StudentRecipe,
    calibration: Callable[[PreTrainedTokenizerBase], Sequence[Sample]],
    device: Device,
) -> tuple[PreTrainedModel, list[int] | None]:
    """The model that students start from, in float32, and which blocks it has of that it is cut from; None if whole.

    Args:
        teacher: what it is cut from, unless the recipe names another model.
        recipe: says how.
        calibration: text to judge blocks by, in the tokens of a tokenizer.
        device: where another model is loaded.

    Raises:
        ModelError: the recipe asks for blocks the model has not.
    """
    source = teacher if recipe.model is None else load(recipe.model, device=device, dtype="float32")
    source.model.config.architectures = [type(source.model).__name__]
    total = len(blocks_of(source.model))
    check_blocks(recipe, total)
    if recipe.blocks is None and source is not teacher:
        return source.model, None
    blocks = _choose(source, recipe, calibration, total)
    return extract(source.model, blocks).float(), blocks


def student_from(
    config: PretrainedConfig, weights: Weights, frozen: Weights, recipe: StudentRecipe, device: torch.device
) -> PreTrainedModel:
    """A student in float32, with its adapters where it has them.

    Args:
        config: the model's.
        weights: what is trained.
        frozen: where only adapters are, the weights beneath them; unused otherwise.
        recipe: says which.
        device: where to put it.
    """
    if recipe.lora is None:
        return build(config, weights, device=device, dtype=torch.float32)
    model = attach(build(config, frozen, device=device, dtype=torch.float32), recipe.lora, seed=0)
    load_learnt(model, weights)
    return model.eval()


def check_vocabulary(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """Whether a student with the teacher's tokenizer has as many words.

    Raises:
        ModelError: it has not.
    """
    words, wanted = student.vocab_size, teacher.vocab_size
    if words != wanted:
        raise ModelError(f"student.model has a vocabulary of {words} words; allowed: the teacher's, {wanted}")


def check_blocks(recipe: StudentRecipe, total: int) -> None:
    """Whether a model with ``total`` blocks has those a recipe asks for.

    Raises:
        ModelError: it has not.
    """
    if isinstance(recipe.blocks, int):
        if not 1 <= recipe.blocks <= total:
            raise ModelError(f"student.blocks is {recipe.blocks}; allowed: 1 to {total}, the model's blocks")
    elif recipe.blocks is not None and (not recipe.blocks or max(recipe.blocks) >= total):
        raise ModelError(f"student.blocks is {recipe.blocks}; allowed: a list of blocks from 0 to {total - 1}")


def _choose(
    source: Pretrained,
    recipe: StudentRecipe,
    calibration: Callable[[PreTrainedTokenizerBase], Sequence[Sample]],
    total: int,
) -> list[int]:
    if not isinstance(recipe.blocks, int):
        return list(range(total)) if recipe.blocks is None else recipe.blocks
    if recipe.choose == "spacing":
        return evenly_spaced(total, recipe.blocks)
    model = source.model
    samples = calibration(source.tokenizer)
    batches = in_length_order(samples, _CALIBRATION_BATCH, source.tokenizer.pad_token_id)
    places = (batch.to(model.device) for batch in batches)
    return largest(angular_distances(model, ((batch.ids, batch.valid) for batch in places)), recipe.blocks)


def loss_from_signals(
    student: Segment,
    objective: ObjectiveRecipe,
    signals: SignalStore,
    teacher_head: FrozenHead | None,
    teacher_words: Tensor | None = None,
    extras: nn.Module | None = None,
    pairs: Pairs | None = None,
    monitor: Monitor | None = None,
) -> Callable[[Lesson], Loss]:
    """The loss of a micro-batch: the student's rows against what the teacher says about the same texts.

    Args:
        student: with its head.
        objective: what is summed.
        signals: where the teacher's come from.
        teacher_head: for hidden signals.
        teacher_words: the teacher's input embedding (W, D), for objectives that look at the tokens themselves.
        extras: what the objective trains beside the student.
        pairs: the data set in both models' tokens; None where they have one tokenizer.
        monitor: looks on.
    """
    device = next(student.parameters()).device
    weighted = objective.weighted()
    words = None if pairs is None else Words(pairs.map, device)
    modules: dict[str, nn.Module] = {} if extras is None else {objective.kd.name: extras}

    def taught(lesson: Lesson, output: StudentOutput) -> TeacherOutput:
        signal = signals.signal(lesson.asked).to(device)
        if pairs is None or words is None:
            return TeacherOutput(signal, teacher_head, ids=output.ids, embedding=teacher_words)
        return pairs.output(lesson.which, signal, teacher_head, words, teacher_words)

    def loss(lesson: Lesson) -> Loss:
        output = StudentOutput.of(student, lesson.batch.to(device))
        teacher = taught(lesson, output) if objective.kd_weight else None
        found = weighted_sum(weighted, output, teacher, modules)
        if monitor is not None:
            monitor.look(output, teacher, modules)
        return found

    return loss
