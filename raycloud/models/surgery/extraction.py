"""Extraction of a smaller model from chosen blocks of a larger one."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.errors import ModelError
from raycloud.models.structure import blocks_of
from raycloud.models.twin import INDEX_LISTS, auto_class, is_per_block
from raycloud.models.verdict import structure_verdict
from raycloud.models.weights import build, weights_of

_NUMBERS = ("layer_idx", "layer_id", "layer_index", "index")
"""Attributes in which a module keeps the number of its block."""
_LEADING = ("first_k_dense_replace", "num_dense_layers")
"""Settings that count the first blocks, which are of one kind."""


def extract(model: PreTrainedModel, blocks: Sequence[int]) -> PreTrainedModel:
    """Model of the same family with only the given blocks, in the given order, with copied weights.

    Embedding, final norm and head are copied as well; it saves and loads like any other ``transformers`` model. Every
    block is compared with the one that it was copied from: kind, shapes and settings such as its window.

    Raises:
        ValueError: ``blocks`` is empty, or names a block that the model does not have.
        ModelError: no configuration of this type has these blocks in this order.
    """
    total = len(blocks_of(model))
    if not blocks or any(not 0 <= index < total for index in blocks):
        raise ValueError(f"blocks must be some of 0 to {total - 1}, got {list(blocks)}")
    config = _config_of_blocks(model.config, blocks, total)
    config.architectures = [type(model).__name__]
    prefix = next(name for name, module in model.named_modules() if module is blocks_of(model)) + "."
    weights = {name: tensor for name, tensor in weights_of(model).items() if not name.startswith(prefix)}
    for name, tensor in weights_of(model).items():
        if name.startswith(prefix):
            old, _, rest = name.removeprefix(prefix).partition(".")
            weights |= {f"{prefix}{new}.{rest}": tensor for new, index in enumerate(blocks) if index == int(old)}
    try:
        student = build(config, weights, device=model.device, dtype=model.dtype)
    except (ModelError, ValueError, LookupError) as error:
        raise _no_such_model(model, blocks, (str(error).splitlines() or [""])[0]) from error
    for new, index in enumerate(blocks):
        if (why := _difference(blocks_of(model)[index], blocks_of(student)[new])) is not None:
            raise _no_such_model(model, blocks, f"block {new} would not be the model's block {index}: {why}")
    if model.can_generate():
        student.generation_config = copy.deepcopy(model.generation_config)
    return student


def check_extraction(config: PretrainedConfig, blocks: Sequence[int]) -> None:
    """Check that models of a configuration have a model of the given blocks that runs in segments; reads no weights.

    Raises:
        ModelError: no configuration of this type has these blocks in this order, or its models cannot be cut, such as
            those of a hybrid without any block that attends.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
        student = extract(model, blocks)
    if why := structure_verdict(student.config).reason:
        raise _no_such_model(model, blocks, why.removesuffix("; run it whole"))


def _config_of_blocks(config: PretrainedConfig, blocks: Sequence[int], total: int) -> PretrainedConfig:
    """Copy of a configuration whose settings of each block are those of the chosen blocks."""
    made = copy.deepcopy(config)
    for name, value in vars(config).items():
        if name in INDEX_LISTS and value is not None:
            setattr(made, name, [new for new, index in enumerate(blocks) if index in value])
        elif name in _LEADING and value is not None:
            setattr(made, name, sum(index < value for index in blocks))
        elif is_per_block(name, value, total):
            setattr(made, name, [value[index] for index in blocks])
    made.num_hidden_layers = len(blocks)
    return made


def _difference(theirs: nn.Module, ours: nn.Module) -> str | None:
    """First difference between two blocks in the kinds and plain settings of their modules; None if there is none."""
    left, right = dict(theirs.named_modules()), dict(ours.named_modules())
    if left.keys() != right.keys():
        return "other modules"
    for path, module in left.items():
        other, where = right[path], path or "the block"
        if type(module) is not type(other):
            return f"{where} is a {type(other).__name__}, not a {type(module).__name__}"
        for name, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str, type(None)))
            if not plain or name.startswith("_") or name in (*_NUMBERS, "training"):
                continue
            if (found := getattr(other, name, None)) != value:
                return f"{name} of {where} is {found}, not {value}"
    return None


def _no_such_model(model: PreTrainedModel, blocks: Sequence[int], why: str) -> ModelError:
    kind = model.config.model_type
    return ModelError(f"no '{kind}' model consists of the blocks {list(blocks)}: {why[:240]}; allowed: other blocks")
