"""State of the cloud that an edge gets: weights that changed since its version, and how to notice drift with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.errors import LinkError
from raycloud.retrain.alarms import ErrorReference
from raycloud.retrain.drift import DriftDetector, TapStatistics
from raycloud.retrain.samples import Samples


@dataclass(frozen=True)
class Deployment:
    """State of the cloud's model for an edge."""

    version: int
    fingerprint: str
    """Fingerprint of the model that the versions began with."""
    weights: Mapping[str, Tensor]
    """Parameters that changed since the edge's version; all of them for a new edge."""
    detector: DriftDetector
    """Detector for these weights."""
    usual: ErrorReference
    """Errors of the source domain."""
    replayed: Samples | None
    """Source samples against forgetting; None if the recipe replays none."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors by name, for safetensors."""
        tensors = {f"weights/{name}": one.contiguous() for name, one in self.weights.items()}
        source = self.detector.source
        for tap, (mean, variance) in enumerate(zip(source.mean, source.variance, strict=True)):
            tensors |= {f"mean/{tap}": mean.contiguous(), f"variance/{tap}": variance.contiguous()}
        tensors |= {"centre": self.detector.centre, "spread": self.detector.spread}
        if self.replayed is not None:
            tensors |= {f"replay/{name}": one.contiguous() for name, one in self.replayed.inputs.items()}
            tensors["replayed_labels"] = self.replayed.labels.contiguous()
        usual = self.usual
        numbers = [self.version, self.detector.threshold, usual.mean, usual.deviation, usual.samples]
        fingerprint = torch.tensor(list(self.fingerprint.encode()), dtype=torch.uint8)
        return tensors | {"numbers": torch.tensor(numbers, dtype=torch.float64), "fingerprint": fingerprint}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Deployment:
        """Return the state of a result of :meth:`tensors`.

        Raises:
            LinkError: it is none.
        """
        try:
            version, threshold, mean, deviation, samples = tensors["numbers"].tolist()
            taps = len(tensors["centre"])
            source = TapStatistics(
                tuple(tensors[f"mean/{tap}"] for tap in range(taps)),
                tuple(tensors[f"variance/{tap}"] for tap in range(taps)),
            )
            detector = DriftDetector(source, tensors["centre"], tensors["spread"], threshold)
            replay, labels = _with_prefix(tensors, "replay/"), tensors.get("replayed_labels")
            return Deployment(
                int(version),
                bytes(tensors["fingerprint"].tolist()).decode(),
                _with_prefix(tensors, "weights/"),
                detector,
                ErrorReference(mean, deviation, int(samples)),
                None if labels is None else Samples(replay, labels),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise LinkError(f"the cloud's state cannot be read: {str(error).splitlines()[0]}") from None


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
