"""Extraction of a smaller model from chosen blocks of a larger one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from transformers import PreTrainedModel

from raycloud.models.structure import blocks_of
from raycloud.models.weights import build, weights_of


def extract(model: PreTrainedModel, blocks: Sequence[int]) -> PreTrainedModel:
    """Model of the same family with only the given blocks, in the given order, with copied weights.

    Embedding, final norm and head are copied as well; it saves and loads like any other ``transformers`` model.

    Raises:
        ValueError: ``blocks`` is empty, or names a block that the model does not have.
    """
    total = len(blocks_of(model))
    if not blocks or any(not 0 <= index < total for index in blocks):
        raise ValueError(f"blocks must be some of 0 to {total - 1}, got {list(blocks)}")
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.num_hidden_layers = len(blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[index] for index in blocks]
    prefix = next(name for name, module in model.named_modules() if module is blocks_of(model)) + "."
    weights = {name: tensor for name, tensor in weights_of(model).items() if not name.startswith(prefix)}
    for name, tensor in weights_of(model).items():
        if name.startswith(prefix):
            old, _, rest = name.removeprefix(prefix).partition(".")
            weights |= {f"{prefix}{new}.{rest}": tensor for new, index in enumerate(blocks) if index == int(old)}
    student = build(config, weights, device=model.device, dtype=model.dtype)
    if model.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    return student
