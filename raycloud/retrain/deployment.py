"""What an edge gets of the cloud: weights that changed since its version, and how to notice drift with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raycloud.errors import LinkError
from raycloud.retrain.alarms import ErrorReference
from raycloud.retrain.drift import DriftDetector, TapStatistics
from raycloud.retrain.samples import Samples

_ABOUT = "deployment"


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

    def to_bytes(self) -> bytes:
        """Write as safetensors."""
        tensors = {f"weights/{name}": one.contiguous() for name, one in self.weights.items()}
        source = self.detector.source
        for tap, (mean, variance) in enumerate(zip(source.mean, source.variance, strict=True)):
            tensors |= {f"mean/{tap}": mean.contiguous(), f"variance/{tap}": variance.contiguous()}
        tensors |= {"centre": self.detector.centre, "spread": self.detector.spread}
        if self.replayed is not None:
            tensors |= {f"replay/{name}": one.contiguous() for name, one in self.replayed.inputs.items()}
            tensors["replayed_labels"] = self.replayed.labels.contiguous()
        about = {
            "version": self.version,
            "fingerprint": self.fingerprint,
            "threshold": self.detector.threshold,
            "usual": [self.usual.mean, self.usual.deviation, self.usual.samples],
        }
        return save(tensors, {_ABOUT: json.dumps(about)})

    @staticmethod
    def from_bytes(raw: bytes) -> Deployment:
        """Read a result of :meth:`to_bytes`.

        Raises:
            LinkError: it is none.
        """
        try:
            tensors = load(raw)
            size = int.from_bytes(raw[:8], "little")
            about = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"][_ABOUT])
            taps = len(tensors["centre"])
            source = TapStatistics(
                tuple(tensors[f"mean/{tap}"] for tap in range(taps)),
                tuple(tensors[f"variance/{tap}"] for tap in range(taps)),
            )
            detector = DriftDetector(source, tensors["centre"], tensors["spread"], float(about["threshold"]))
            replay, labels = _with_prefix(tensors, "replay/"), tensors.get("replayed_labels")
            return Deployment(
                int(about["version"]),
                str(about["fingerprint"]),
                _with_prefix(tensors, "weights/"),
                detector,
                ErrorReference(*about["usual"]),
                None if labels is None else Samples(replay, labels),
            )
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise LinkError(f"{len(raw)} bytes are no deployment: {str(error).splitlines()[0]}") from None


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
