"""Codec of hidden states that centres and scales them, sends outlier coordinates as float16 and transforms the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.link.codecs.codec import Codec, check_payload, check_width
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.transforms import Transform

_FLOAT16 = CODECS["float16"]


@dataclass(frozen=True, eq=False)
class CutStatistics:
    """Statistics of a cut's hidden states, known at both ends.

    Args:
        mean: (width,) mean, subtracted before coding.
        unit: scale; numbers are coded as multiples of it, so that float16's range is no limit for any model.
        outliers: (m,) indices of coordinates sent as float16: a few in which hidden states are far larger.
    """

    mean: Tensor
    unit: float
    outliers: Tensor


@dataclass(frozen=True, eq=False)
class CentredCodec:
    """Codec of outlier coordinates as float16, followed by the transformed rest in an inner codec.

    Args:
        name: name of the codec in recipes.
        baseline: statistics of the cut, known at both ends.
        transform: linear map of the rest; outliers are zero in its input.
        inner: codec of the transform's output.
    """

    name: str
    baseline: CutStatistics
    transform: Transform
    inner: Codec

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        return len(self.baseline.mean)

    @property
    def _outlier_bytes(self) -> int:
        return _FLOAT16.bytes_per_row(len(self.baseline.outliers))

    def bytes_per_row(self, width: int) -> int:
        """Payload bytes of one hidden state of ``width`` numbers."""
        check_width(self.name, self.width, width)
        return self._outlier_bytes + self.inner.bytes_per_row(self.transform.size)

    def encode(self, hidden: Tensor) -> Tensor:
        """Encode hidden states (n, width) as (n, bytes per hidden state) uint8."""
        check_width(self.name, self.width, hidden.shape[1])
        centred = (hidden.float() - self.baseline.mean) / self.baseline.unit
        outliers = _FLOAT16.encode(centred[:, self.baseline.outliers])
        rest = centred.index_fill(1, self.baseline.outliers, 0.0)
        return torch.cat([outliers, self.inner.encode(self.transform.forward(rest))], dim=1)

    def decode(self, payload: Tensor) -> Tensor:
        """Decode (n, bytes per hidden state) uint8 to hidden states (n, width) float32.

        Raises:
            ValueError: the payload has another number of bytes per hidden state.
        """
        check_payload(self.name, self.bytes_per_row(self.width), payload)
        rest = self.transform.back(self.inner.decode(payload[:, self._outlier_bytes :]))
        rest[:, self.baseline.outliers] = _FLOAT16.decode(payload[:, : self._outlier_bytes])
        return rest * self.baseline.unit + self.baseline.mean
