"""Weights of a model as a plain mapping of tensors, and a model built from a configuration and such a mapping."""

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
    """Parameters and saved buffers by name, detached, not copied; tied tensors once."""
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *buffers)}


def all_finite(weights: Weights) -> bool:
    """Return whether every number is finite: one that is not spreads through an average to all clients."""
    return all(bool(tensor.isfinite().all()) for tensor in weights.values())


def load_weights(model: PreTrainedModel, weights: Weights) -> None:
    """Copy weights into a model.

    Raises:
        ModelError: names or shapes differ from those of the model.
    """
    copy_weights(weights_of(model), weights)


def copy_weights(wanted: Weights, weights: Weights) -> None:
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
    """Model of the architecture that the configuration names, with these weights, in evaluation mode.

    Raises:
        ModelError: there is no such architecture, or names or shapes of the weights differ from those of the model.
    """
    name = (config.architectures or ["none"])[0]
    architecture = getattr(transformers, name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise ModelError(f"the configuration's architecture is '{name}', which transformers does not have")
    model: PreTrainedModel = architecture._from_config(config, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]
    load_weights(model, weights)
    return model.eval()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and every byte, in hexadecimal."""
    plain = tensor.detach().contiguous().cpu()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    # The bytes are viewed as uint8: numpy has no bfloat16.
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(weights: Weights) -> str:
    """Fingerprint of weights: a short hash of names, shapes and all values of every tensor.

    Half precision counts as the same values in float32: widening a model to float32 does not change its fingerprint.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        narrow = tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize
        digest.update(f"{name}{tensor_digest(tensor.float() if narrow else tensor)}".encode())
    return digest.hexdigest()[:16]


def nbytes(weights: Weights) -> int:
    """Total bytes of the tensors."""
    return sum(tensor.nbytes for tensor in weights.values())
