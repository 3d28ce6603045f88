"""Rows relative to what is known of their cut: centred, scaled, a few coordinates sent apart, the rest transformed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raycloud.link.codecs.codec import Codec, check_payload, check_width
from raycloud.link.codecs.floats import CODECS
from raycloud.link.codecs.transforms import Transform

_FLOAT16 = CODECS["float16"]


@dataclass(frozen=True, eq=False)
class Baseline:
    """What both ends know of a cut's rows.

    Args:
        mean: (width,) subtracted before coding.
        unit: numbers are coded as multiples of it, so that float16's range is no limit for any model.
        outliers: (m,) coordinates sent as float16: a few in which rows are far larger than elsewhere.
    """

    mean: Tensor
    unit: float
    outliers: Tensor


@dataclass(frozen=True, eq=False)
class Relative:
    """Outliers of a baseline as float16, then the transformed rest in an inner codec.

    Args:
        name: what recipes call it.
        baseline: what both ends know of these rows.
        transform: what becomes of the rest; it sees zeros in the place of outliers.
        inner: codes the transform's numbers.
    """

    name: str
    baseline: Baseline
    transform: Transform
    inner: Codec

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return len(self.baseline.mean)

    @property
    def _outlier_bytes(self) -> int:
        return _FLOAT16.bytes_per_row(len(self.baseline.outliers))

    def bytes_per_row(self, width: int) -> int:
        """Payload bytes of one row of ``width`` numbers."""
        check_width(self.name, self.width, width)
        return self._outlier_bytes + self.inner.bytes_per_row(self.transform.size)

    def encode(self, rows: Tensor) -> Tensor:
        """(n, width) numbers to (n, bytes per row) uint8."""
        check_width(self.name, self.width, rows.shape[1])
        centred = (rows.float() - self.baseline.mean) / self.baseline.unit
        apart = _FLOAT16.encode(centred[:, self.baseline.outliers])
        rest = centred.index_fill(1, self.baseline.outliers, 0.0)
        return torch.cat([apart, self.inner.encode(self.transform.forward(rest))], dim=1)

    def decode(self, payload: Tensor) -> Tensor:
        """(n, bytes per row) uint8 to (n, width) float32.

        Raises:
            ValueError: the payload has another number of bytes per row.
        """
        check_payload(self.name, self.bytes_per_row(self.width), payload)
        rest = self.transform.back(self.inner.decode(payload[:, self._outlier_bytes :]))
        rest[:, self.baseline.outliers] = _FLOAT16.decode(payload[:, : self._outlier_bytes])
        return rest * self.baseline.unit + self.baseline.mean
