"""A model's weights as a plain mapping of tensors, and a model from a configuration and such a mapping."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from raycloud.errors import ModelError

Weights = Mapping[str, Tensor]


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, detached, not copied; tied ones once."""
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *buffers)}


def load_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Copy weights into a model.

    Raises:
        ModelError: they are not exactly this model's.
    """
    fill(weights_of(model), weights)


def fill(wanted: Weights, weights: Weights) -> None:
    """Copy weights into tensors of the same names.

    Raises:
        ModelError: names or shapes differ.
    """
    odd = sorted(set(wanted) ^ set(weights)) or [name for name in wanted if wanted[name].shape != weights[name].shape]
    if odd:
        raise ModelError(f"weights do not fit the model: {len(odd)} tensors differ, the first is '{odd[0]}'")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(weights[name])


def build(config: PretrainedConfig, weights: Weights, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the architecture that the configuration names, with these weights, in evaluation mode.

    Raises:
        ModelError: there is no such architecture, or the weights are not exactly this model's.
    """
    name = (config.architectures or ["none"])[0]
    architecture = getattr(transformers, name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise ModelError(f"the configuration's architecture is '{name}', which transformers has not")
    model: PreTrainedModel = architecture._from_config(config, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]
    load_weights(model, weights)
    return model.eval()


def fingerprint(weights: Weights) -> str:
    """A short hash of names, shapes and some values of every tensor: tells checkpoints apart, proves nothing."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        some = tensor.flatten()[:: max(1, tensor.numel() // 64)].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def nbytes(weights: Weights) -> int:
    """Bytes the tensors take."""
    return sum(tensor.nbytes for tensor in weights.values())
