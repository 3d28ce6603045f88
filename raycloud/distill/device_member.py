"""Description of a distillation for one of its devices, as the service of rounds sends it before the device joins:
recipe, student configuration, sizes and files, from which the device derives what is demanded of it."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from safetensors.torch import save
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raycloud.distill.learner import TeacherClient
from raycloud.distill.recipe import DistillEdgeRecipe, DistillRecipe
from raycloud.distill.round_report import RoundReport
from raycloud.distill.student import differing_tokenizer
from raycloud.rounds.service import DeviceMember


def device_member(
    recipe: DistillRecipe,
    edge: DistillEdgeRecipe,
    config: PretrainedConfig,
    weights_bytes: int,
    teacher: TeacherClient,
    head_shape: tuple[int, int],
    run: str,
) -> DeviceMember:
    """Describe a distillation for one of its devices.

    Args:
        recipe: whole distillation recipe.
        edge: edge of the recipe that is the device.
        config: config of the student model.
        weights_bytes: bytes of the trained weights.
        teacher: client of the teacher.
        head_shape: size of the teacher's vocabulary and its hidden size at the head.
        run: id of the run; a resumed run keeps it, and so devices keep their state.
    """
    cohort, frozen = recipe.cohort_of(edge), teacher.frozen()
    own = differing_tokenizer(cohort.student, teacher.tokenizer)
    blobs = _files("tokenizer", teacher.tokenizer) | ({} if own is None else _files("student_tokenizer", own))
    if frozen:
        blobs["frozen"] = save({name: tensor.contiguous() for name, tensor in frozen.items()})
    training = recipe.training
    tokens = training.batch_size * training.gradient_accumulation_steps * recipe.data.max_length
    sizes = {"vocabulary_size": str(head_shape[0]), "hidden_size": str(head_shape[1])}
    return DeviceMember(
        recipe=recipe.for_device(edge).model_dump_json(),
        config=config.to_json_string(use_diff=False),
        weights_bytes=weights_bytes,
        facts={"run": run, "teacher": teacher.name, **sizes},
        blobs=blobs,
        most_samples=recipe.rounds.steps * tokens,
        parse_report=partial(RoundReport.parse, most_steps=recipe.rounds.steps),
    )


def _files(folder: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Return the files of a tokenizer by name."""
    with tempfile.TemporaryDirectory() as path:
        tokenizer.save_pretrained(path)
        return {f"{folder}/{file.name}": file.read_bytes() for file in sorted(Path(path).iterdir())}
