"""Update of an edge: the changes of the weights that it trained in one window, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from raycloud.errors import ModelError
from raycloud.models.weights import Weights, all_finite
from raycloud.rounds.contribution import Contribution, TensorIndex

_DELTA, _INDEX, _HEADER = "delta/", "index/", "update"


@dataclass(frozen=True)
class BlockUpdate:
    """Changes of weights against a version of the cloud's model."""

    model: str
    """Fingerprint of the model's configuration."""
    version: int
    """Version of the cloud's weights that the window began with."""
    samples: int
    """Number of samples that the changes were trained on."""
    deltas: Mapping[str, Tensor]
    """Changes by name of the parameter; those of a slice have its shape."""
    index: Mapping[str, TensorIndex] = field(default_factory=dict)
    """Where the entries of slices lie in the whole parameters."""

    def to_bytes(self) -> bytes:
        """Write as safetensors."""
        tensors = {_DELTA + name: one.contiguous() for name, one in self.deltas.items()}
        for name, index in self.index.items():
            tensors |= {f"{_INDEX}{dim}/{name}": at.contiguous() for dim, at in index.items()}
        about = {"model": self.model, "version": self.version, "samples": self.samples}
        return save(tensors, {_HEADER: json.dumps(about)})

    @staticmethod
    def from_bytes(raw: bytes) -> BlockUpdate:
        """Read a result of :meth:`to_bytes`.

        Raises:
            ModelError: it is none.
        """
        try:
            tensors = load(raw)
            size = int.from_bytes(raw[:8], "little")
            about = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"][_HEADER])
            model, version, samples = str(about["model"]), int(about["version"]), int(about["samples"])
            deltas, index = dict[str, Tensor](), dict[str, dict[int, Tensor]]()
            for key, tensor in tensors.items():
                if key.startswith(_DELTA):
                    deltas[key.removeprefix(_DELTA)] = tensor
                else:
                    dim, name = key.removeprefix(_INDEX).split("/", 1)
                    index.setdefault(name, {})[int(dim)] = tensor
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{len(raw)} bytes are no update of blocks: {str(error).splitlines()[0]}") from error
        return BlockUpdate(model, version, samples, deltas, index)

    def contribution(self, current: Weights) -> Contribution:
        """Contribution to a round: the current weights where the update has some, with its changes.

        Changes that began with an older version are added to the current one. Their weight in a mean falls with age,
        which the caller says by the number of samples.

        Raises:
            ModelError: the update does not fit the weights.
        """
        weights = dict[str, Tensor]()
        for name, delta in self.deltas.items():
            if (whole := current.get(name)) is None:
                raise ModelError(f"the update has '{name}', which the model has not")
            part = whole
            for dim, at in self.index.get(name, {}).items():
                if not 0 <= dim < whole.dim() or not len(at) or int(at.min()) < 0 or int(at.max()) >= whole.shape[dim]:
                    raise ModelError(f"the index of '{name}' in the update does not fit its shape {tuple(whole.shape)}")
                part = part.index_select(dim, at)
            if part.shape != delta.shape:
                raise ModelError(f"the change of '{name}' is {tuple(delta.shape)}; allowed: {tuple(part.shape)}")
            weights[name] = (part.to(delta.dtype) + delta).to(whole.dtype)
        if not all_finite(weights):
            raise ModelError("the update is not all finite")
        return Contribution(weights, self.samples, self.index)


def changes(parameters: Mapping[str, nn.Parameter], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Changes of parameters since ``before``, without those that did not change."""
    found = {name: parameter.detach() - before[name] for name, parameter in parameters.items()}
    return {name: one for name, one in found.items() if bool(torch.count_nonzero(one))}
