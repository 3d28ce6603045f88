"""Versions of a distillation's students: the history of each cohort, and a student written as of any version.

A version holds what the edges train. With adapters the frozen weights beneath them belong to the start, so that a
history is enough to make the student again, without the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raycloud.distill.recipe import Cohort, DistillRecipe, StudentRecipe
from raycloud.distill.student import build_student
from raycloud.durable import write_folder
from raycloud.errors import ModelError
from raycloud.models.loading import load_config, load_tokenizer
from raycloud.models.weights import Weights
from raycloud.results import RECIPE
from raycloud.rounds.versions import VERSIONS, VersionStore
from raycloud.training.lora import save_adapter, save_model

_FROZEN = "frozen/"


class StudentHistory:
    """History of a cohort in a result directory, written from round to round.

    Args:
        recipe: recipe of the run.
        cohort: the cohort.
        results: result directory.
    """

    def __init__(self, recipe: DistillRecipe, cohort: Cohort, results: Path) -> None:
        self._versions = VersionStore(results / VERSIONS / cohort_folder(recipe, cohort), recipe.rounds.keep_versions)

    def resume(self, rounds: int) -> bool:
        """Go back to the version after some complete rounds; return False if there is none, so that it must start."""
        records = self._versions.records()
        self._versions.forget_after(max((one.version for one in records if (one.round or 0) <= rounds), default=-1))
        return self._versions.current >= 0

    def start(self, weights: Weights, frozen: Weights, perplexity: float | None) -> None:
        """Add the first version.

        Args:
            weights: the weights that will be trained.
            frozen: weights beneath the adapters; empty without adapters.
            perplexity: perplexity on held-out text.
        """
        whole = {**weights, **{_FROZEN + name: tensor for name, tensor in frozen.items()}}
        self._versions.add(whole, note="start", figures=_known({"perplexity": perplexity}))

    def add(
        self, weights: Weights, round: int, tokens: Mapping[str, int], *, loss: float, perplexity: float | None
    ) -> None:
        """Add the version that a round made.

        Args:
            weights: the trained weights.
            round: number of the round, from 1.
            tokens: tokens that each edge trained on in this round.
            loss: mean loss of these tokens.
            perplexity: perplexity on held-out text; None if it was not measured.
        """
        figures = _known({"loss": loss, "perplexity": perplexity})
        self._versions.add(weights, round=round, members=sorted(tokens), samples=sum(tokens.values()), figures=figures)


def write_student(
    results: Path,
    name: str,
    recipe: StudentRecipe,
    config: PretrainedConfig,
    weights: Weights,
    frozen: Weights,
    tokenizer: PreTrainedTokenizerBase,
) -> int:
    """Write a student as a model for ``transformers``, and its adapters separately; return its parameter count.

    Args:
        results: result directory.
        name: name of its cohort if the run has several, otherwise empty.
        recipe: recipe of the student.
        config: configuration of the model.
        weights: the trained weights.
        frozen: weights beneath the adapters; unused without adapters.
        tokenizer: tokenizer of the student.
    """
    model = build_student(config, weights, frozen, recipe, torch.device("cpu"))
    if recipe.lora is not None:  # before they are merged
        adapter = results / (f"adapters/{name}" if name else "adapter")
        write_folder(adapter, lambda to: save_adapter(model, to, recipe.model))
    write_folder(_student_folder(results, name), lambda to: save_model(model, tokenizer, to))
    return model.num_parameters()


def restore_student(results: Path, name: str, weights: Weights) -> None:
    """Write the student of a finished run again, from the weights of one of its versions.

    Args:
        results: result directory.
        name: name of its cohort if the run has several, otherwise empty.
        weights: weights of the version.

    Raises:
        ModelError: the student's folder is missing, or has lost its configuration or tokenizer.
    """
    recipe, folder = DistillRecipe.load(results / RECIPE), _student_folder(results, name)
    if not folder.is_dir():
        raise ModelError(f"'{folder}' is missing, whose configuration and tokenizer every version has")
    cohort = next(one for one in recipe.cohorts if cohort_folder(recipe, one) == name)
    trained = {key: tensor for key, tensor in weights.items() if not key.startswith(_FROZEN)}
    frozen = {key.removeprefix(_FROZEN): tensor for key, tensor in weights.items() if key.startswith(_FROZEN)}
    config, tokenizer = load_config(str(folder)), load_tokenizer(str(folder))
    write_student(results, name, cohort.student, config, trained, frozen, tokenizer)


def cohort_folder(recipe: DistillRecipe, cohort: Cohort) -> str:
    """Return the name of a cohort's folders in a result directory; empty if the run has no other cohort."""
    return cohort.name if len(recipe.cohorts) > 1 else ""


def _student_folder(results: Path, name: str) -> Path:
    return results / (f"students/{name}" if name else "student")


def _known(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if figure is not None}
