"""What both ends of a link must agree on about its codecs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from raycloud.errors import LinkError
from raycloud.link.codecs import CODECS
from raycloud.link.codecs.boundary import Boundary, plain_boundary

CODEC_NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4, "low-rank": 5, "low-rank-int8": 6}
"""How a header names a codec."""


class Calibrated(Protocol):
    """Codecs fitted to one model's rows, such as :class:`raycloud.split.calibration.Calibration`."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything fitted."""
        ...

    def boundary(self, codec: str, cut: int) -> Boundary:
        """The code of one cut; LinkError if it was not calibrated."""
        ...


@dataclass(frozen=True)
class Codecs:
    """The codes of a model's cuts: casts for any cut, smaller ones where they were calibrated."""

    width: int
    calibration: Calibrated | None = None

    def boundary(self, codec: str, cut: int) -> Boundary:
        """The code of one cut.

        Raises:
            LinkError: the codec is unknown, or needs a calibration that this end does not have.
        """
        if codec not in CODEC_NUMBERS:
            raise LinkError(f"no codec '{codec}'; allowed: {', '.join(CODEC_NUMBERS)}")
        if codec in CODECS:
            return plain_boundary(codec, self.width)
        if self.calibration is None:
            raise LinkError(f"codec '{codec}' needs a calibration (raycloud split calibrate) and none was given")
        return self.calibration.boundary(codec, cut)

    def fingerprint(self, codec: str) -> str:
        """What the other end must have to decode it: empty for casts."""
        return "" if codec in CODECS or self.calibration is None else self.calibration.fingerprint
