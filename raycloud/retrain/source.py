"""Source of retraining: the cloud's model, the data of its domains, and the detector of drift from its own domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raycloud.data.batches import SampleOrder
from raycloud.data.images import image_rows
from raycloud.data.sources import load_rows
from raycloud.errors import ModelError, RecipeError
from raycloud.models.block_trace import without_cache
from raycloud.models.chain import block_list_of
from raycloud.models.configuration import first_line, load_auto, load_config, quiet_transformers
from raycloud.models.loading import load_tokenizer, resolve
from raycloud.retrain.alarms import ErrorReference
from raycloud.retrain.domain_data import CachedDomains, DomainData
from raycloud.retrain.domain_images import DIGITS, DigitsDomains, FolderDomains
from raycloud.retrain.domain_texts import TextDomains, text_classes
from raycloud.retrain.drift import DriftDetector, tap_means
from raycloud.retrain.recipe import RetrainRecipe
from raycloud.retrain.samples import Samples
from raycloud.retrain.tasks import TASKS, LossOf
from raycloud.retrain.trainer import mean_error
from raycloud.training.loop import Loss, Step, Trainer
from raycloud.training.recipe import TrainingRecipe
from raycloud.training.seeding import derive_seed, seeded

_MOST_CLEAN = 512
"""Largest number of clean samples on which the detector is calibrated."""
Notify = Callable[[str], None]


@dataclass(frozen=True)
class SourceParts:
    """Configuration, data and tokenizer of a recipe, without weights."""

    config: PretrainedConfig
    data: DomainData
    tokenizer: PreTrainedTokenizerBase | None
    """None for images."""
    where: str | None
    """Folder or hub id of the weights; None for a new model."""
    auto: Any
    """Class of ``transformers`` that makes or loads the model."""
    classes: list[Any]
    """Classes in the order of the model's outputs; empty for language modelling."""


def is_images(recipe: RetrainRecipe) -> bool:
    """Return whether the data of a recipe are images."""
    return recipe.data.source == DIGITS or Path(recipe.data.source).expanduser().is_dir()


def auto_class_of(recipe: RetrainRecipe) -> Any:
    """Class of ``transformers`` that makes and loads the models of a recipe."""
    if is_images(recipe):
        return AutoModelForImageClassification
    return {
        "language_modelling": AutoModelForCausalLM,
        "classification": AutoModelForSequenceClassification,
        "token_tagging": AutoModelForTokenClassification,
    }[recipe.task]


def source_parts(recipe: RetrainRecipe, source: str | None = None, notify: Notify = lambda line: None) -> SourceParts:
    """Read configuration, tokenizer and data of a recipe.

    Args:
        recipe: recipe of the job.
        source: data of an edge; None for those of the recipe.
        notify: called with one line before each download.

    Raises:
        RecipeError: task, model and data do not belong together.
        ModelError: the model cannot be read.
        DataError: the data cannot be read.
    """
    images, where = is_images(recipe), None
    if isinstance(recipe.model, str):
        where = resolve(recipe.model, notify)
        config = load_config(where)
    else:
        config = _new_config(recipe.model)
    if images and recipe.task != "classification":
        raise RecipeError(f"task={recipe.task} of images; allowed: classification")
    if images != (hasattr(config, "num_channels") and hasattr(config, "image_size")):
        kind = "images" if images else "texts"
        raise RecipeError(f"data.source={recipe.data.source} has {kind}, and the model '{config.model_type}' does not")
    tokenizer, classes = None, list[Any]()
    data: DomainData
    if images:
        if (given := source or recipe.data.source) == DIGITS:
            classes = DigitsDomains.classes
            data = DigitsDomains(config, recipe.seed)
        else:
            folder = Path(given).expanduser()
            classes = recipe.data.classes or sorted({row["label"] for row in image_rows(folder)})
            own = recipe.data.source_domain if recipe.source.steps else None
            data = FolderDomains(folder, config, classes, own)
    else:
        named = where if recipe.tokenizer is None else resolve(recipe.tokenizer, notify)
        if named is None:
            raise RecipeError("tokenizer is null, and the model is a new one; allowed: a model with a tokenizer")
        tokenizer = load_tokenizer(named)
        rows = load_rows(source or recipe.data.source, "all", notify)
        classes = [] if recipe.task == "language_modelling" else text_classes(rows, recipe)
        data = TextDomains(rows, recipe, tokenizer, classes)
        if getattr(config, "vocab_size", len(tokenizer)) < len(tokenizer):
            raise RecipeError(
                f"the tokenizer has {len(tokenizer)} tokens, and the model's vocab_size is {config.vocab_size}; "
                "allowed: as many or more"
            )
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
    if classes:
        config.num_labels = len(classes)
        config.id2label = {index: str(value) for index, value in enumerate(classes)}
        config.label2id = {str(value): index for index, value in enumerate(classes)}
    return SourceParts(config, CachedDomains(data), tokenizer, where, auto_class_of(recipe), classes)


def source_model(parts: SourceParts, recipe: RetrainRecipe, device: torch.device) -> PreTrainedModel:
    """Model of a recipe in float32, before any training; what it has no weights for begins at random by the seed.

    Raises:
        ModelError: it cannot be made or read.
    """
    with seeded({}, derive_seed(recipe.seed, "model")):
        model = new_model(parts) if parts.where is None else _loaded(parts)
    _ = block_list_of(model)
    return model.to(device).eval()  # type: ignore[arg-type]


def new_model(parts: SourceParts) -> PreTrainedModel:
    """Model of the configuration with random weights.

    Raises:
        ModelError: the library has no such model.
    """
    try:
        with quiet_transformers():
            made: PreTrainedModel = parts.auto.from_config(parts.config, dtype=torch.float32)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"no {parts.auto.__name__} of '{parts.config.model_type}': {first_line(error)}") from None
    return made


def _loaded(parts: SourceParts) -> PreTrainedModel:
    loaded: PreTrainedModel = load_auto(parts.auto, str(parts.where), config=parts.config, dtype=torch.float32)
    return loaded


def _new_config(values: dict[str, Any]) -> PretrainedConfig:
    options = dict(values)
    kind = options.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"model.model_type '{kind}' is not one of transformers")
    try:
        config: PretrainedConfig = CONFIG_MAPPING[kind](**options)
    except (TypeError, ValueError) as error:
        raise ModelError(f"model: {first_line(error)}") from None
    return config


@dataclass(frozen=True)
class _SourceBatch:
    samples: Samples
    targets: int


def train_source(
    model: PreTrainedModel, recipe: RetrainRecipe, samples: Samples, on_step: Callable[[Step], None] = lambda step: None
) -> None:
    """Train the whole model on its source domain, in place.

    Args:
        model: the model.
        recipe: recipe with ``source``.
        samples: samples of the source domain.
        on_step: called after every step.

    Raises:
        TrainingError: gradients stayed non-finite.
    """
    source, loss = recipe.source, TASKS[recipe.task].loss
    settings = TrainingRecipe(
        lr=source.lr,
        warmup_steps=min(20, source.steps // 10),
        batch_size=source.batch_size,
        weight_decay=source.weight_decay,
    )
    trainer = Trainer({"model": model}, settings, total_steps=source.steps, seed=recipe.seed)
    order = SampleOrder([1] * len(samples), source.batch_size, recipe.seed)
    arguments = without_cache(model)

    def loss_of(batch: _SourceBatch) -> Loss:
        found = loss(model(**batch.samples.inputs, **arguments).logits, batch.samples.labels)
        return Loss(found.sum / max(found.count, 1) * batch.targets, batch.targets, {})

    model.train()
    for step in range(source.steps):
        chosen = samples.select(torch.tensor(order.indices(step)))
        on_step(trainer.step([_SourceBatch(chosen, len(chosen))], loss_of))
    model.eval()


def calibrated_detector(model: PreTrainedModel, clean: Samples, recipe: RetrainRecipe) -> DriftDetector:
    """Detector of drift from the source domain, for the present weights.

    Args:
        model: the cloud's model.
        clean: samples of the source domain that trained nothing.
        recipe: recipe with ``drift``.

    Raises:
        ModelError: there are too few samples.
    """
    drift, clean = recipe.drift, clean.at_most(_MOST_CLEAN)
    if len(clean) < 2 * drift.window:
        raise ModelError(
            f"the source domain has {len(clean)} clean samples; allowed: twice drift.window={drift.window} or more"
        )
    means = tap_means(model, clean)
    return DriftDetector.calibrated(means, drift.window, quantile=drift.quantile, seed=recipe.seed)


def error_reference(model: PreTrainedModel, clean: Samples, error: LossOf, chunk: int = 8) -> ErrorReference:
    """Usual error of a model on clean samples; the deviation of one sample follows from that of chunks of them.

    Args:
        model: the cloud's model.
        clean: samples that trained nothing.
        error: error of the task.
        chunk: number of samples of a chunk.
    """
    clean = clean.at_most(_MOST_CLEAN)
    means = [mean_error(model, one, error) for one in clean.batches(chunk) if len(one) == chunk]
    deviation = float(torch.tensor(means).std()) * chunk**0.5 if len(means) > 1 else 1.0
    return ErrorReference(mean_error(model, clean, error), max(deviation, 1e-3), len(clean))
